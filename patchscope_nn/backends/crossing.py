"""Divides a step of two models into the half that reads the source and the half that writes the target.

Between the two halves, states travel as values. A mapping of the user's own is applied before they travel if
that sends fewer bytes; then its weights stay here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch

from patchscope_nn.body.program import PackedProgram, Read, RowsProgram, StepProgram, Write
from patchscope_nn.mappings import Pair, ResolvedMapping, apply_mapping
from patchscope_nn.plan import Plan, State, Step
from patchscope_nn.spec import SITES

#: The bytes of a log-probability; they are float32 whatever the model is.
_LOGPROB = 4
#: A state, by number, and the (l, l*) it is written for.
Use: TypeAlias = tuple[int, Pair]


class Crossing(NamedTuple):
    """What is sent to the target with a step.

    Attributes:
        states: Source states (mapped or not) and distributions: tensors by state number.
        mapping: The kind of the mapping that is left to be applied there, and its weights.
        renumbered: If states were mapped here, once for each pair of layers: the number of each result.
        left: Numbers of the states that are then not sent.
    """

    states: dict[int, torch.Tensor]
    mapping: tuple[str, Any]
    renumbered: Mapping[Use, int] = {}
    left: frozenset[int] = frozenset()


def source_half(program: StepProgram) -> StepProgram:
    """The half of a step that reads its states, and returns all of them."""
    read = [entry["state"] for entries in _reads(program) for entry in entries]
    return {
        **program,
        "targets": [],
        "given": {},
        "prefix": None,
        "keep": read,
        "sums": [],
        "writing": {**program["writing"], "mapping": "identity", "weights": None},
    }


def _reads(program: StepProgram) -> Iterator[list[Read]]:
    for source in program["sources"]:
        yield from source["reads"].values()
        yield source["finals"]


def target_half(program: StepProgram, crossing: Crossing) -> StepProgram:
    """The half of a step that writes the states that crossed."""
    known = {number: state for number, state in program["given"].items() if number not in crossing.left}
    kind, weights_left = crossing.mapping
    return {
        **program,
        "sources": [],
        "targets": [_renumbered(target, crossing.renumbered) for target in program["targets"]],
        "given": {**known, **crossing.states},
        "writing": {**program["writing"], "mapping": kind, "weights": weights_left},
    }


def _renumbered(
    target: RowsProgram | PackedProgram, numbers: Mapping[Use, int]
) -> RowsProgram | PackedProgram:
    """A target pass that writes states which were mapped here, each for its own pair of layers."""
    if not numbers:
        return target
    changed = target.copy()
    changed["writes"] = {
        layer: [_with_number(write, numbers) for write in writes]
        for layer, writes in target["writes"].items()
    }
    return changed


def _with_number(write: Write, numbers: Mapping[Use, int]) -> Write:
    if write["state"] is None:
        return write
    return {**write, "state": numbers[write["state"], write["pair"]]}


def in_place_of(program: StepProgram, states: Mapping[int, torch.Tensor]) -> Crossing:
    """Map states here, if that sends fewer bytes than sending them with their mapping.

    Args:
        program: The step.
        states: What its source half returned: hidden states and distributions, by number.

    Returns:
        What crosses.
    """
    kind, call = program["writing"]["mapping"], program["writing"]["weights"]
    if kind == "pairs":
        return _in_place_of_pairs(program, states)
    numbers = {
        read["state"] for source in program["sources"] for reads in source["reads"].values() for read in reads
    }
    hidden = {number: states[number] for number in numbers if number in states}
    mapped = {}
    for number, state in hidden.items() if kind == "call" else ():
        with torch.no_grad():
            mapped[number] = apply_mapping(kind, call, state, state.new_zeros(()))
    # States are summed before they are mapped, so sums cannot be mapped on this side.
    shared = bool(program["given"] or program["keep"] or program["sums"])
    if maps_here(kind, call, states=size(hidden), mapped=size(mapped), shared=shared):
        return Crossing({**states, **mapped}, ("identity", None))
    return Crossing(dict(states), (kind, call))


def _in_place_of_pairs(program: StepProgram, states: Mapping[int, torch.Tensor]) -> Crossing:
    """`in_place_of` for a mapping with weights for each pair of layers; a state may be mapped for several."""
    maps, known = program["writing"]["weights"], {**program["given"], **states}
    whole = Crossing(dict(states), ("pairs", maps))
    if program["sums"]:  # as in `in_place_of`
        return whole
    uses: list[Use] = sorted(
        {
            (write["state"], write["pair"])
            for target in program["targets"]
            for writes in target["writes"].values()
            for write in writes
            if write["state"] is not None
        }
    )
    renumbered = {use: number for number, use in enumerate(uses, start=max(known, default=-1) + 1)}
    with torch.no_grad():
        mapped = {
            renumbered[number, pair]: apply_mapping(
                "pairs", maps, known[number], known[number].new_zeros(()), [pair] * len(known[number])
            )
            for number, pair in uses
        }
    left = frozenset(number for number, _ in uses) - frozenset(program["keep"])
    stays = size({number: known[number] for number in left})
    if not uses or size(mapped) > stays + weights(maps):
        return whole
    sent = {number: state for number, state in states.items() if number not in left}
    return Crossing({**sent, **mapped}, ("identity", None), renumbered, left)


def maps_here(kind: str, call: Any, *, states: int, mapped: int, shared: bool) -> bool:
    """True if a step's states are mapped before they travel, because that sends no more bytes.

    Args:
        kind: The kind of the mapping.
        call: Its function.
        states: The bytes of the hidden states.
        mapped: Their bytes once they are mapped.
        shared: True if another step uses some of them too; then they are mapped on the other side.
    """
    return kind == "call" and states > 0 and not shared and mapped <= states + weights(call)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is sent to M* in all steps of a plan.

    Attributes:
        steps: Steps that send anything.
        states: Hidden states that are sent, counted by position.
        distributions: Next-token distributions of M that are sent.
        bytes: Bytes of all of it, including the mapping's weights if they are sent.
        mapped_here: Steps whose states are mapped before they are sent.
        mapping: The mapping's name.
        weights: The bytes of the mapping's weights; each step that is not mapped here sends them, or of a
            mapping with weights for each pair of layers those of its own pairs.
    """

    steps: int = 0
    states: int = 0
    distributions: int = 0
    bytes: int = 0
    mapped_here: int = 0
    mapping: str = "identity"
    weights: int = 0


def traffic(planned: Plan, mapping: ResolvedMapping) -> Traffic | None:
    """Predicts what will be sent between two models; None if they share a context.

    Args:
        planned: The plan.
        mapping: f.
    """
    if planned.context != "bridged":
        return None
    source = planned.sweep.source
    total = Traffic(mapping=mapping.name, weights=weights(mapping.maps or mapping.call))
    for step in planned.steps():
        finals = sum(state.layer is None for state in step.numbers)
        sent = (
            _pairs_sent(planned, step, mapping) if mapping.kind == "pairs" else _sent(planned, step, mapping)
        )
        total = replace(
            total,
            steps=total.steps + bool(step.numbers),
            states=total.states + sent.states,
            distributions=total.distributions + finals,
            bytes=total.bytes + sent.bytes + finals * source.vocab_size * _LOGPROB,
            mapped_here=total.mapped_here + sent.mapped_here,
        )
    return total


class _Sent(NamedTuple):
    """What a step sends besides distributions.

    Attributes:
        states: Hidden states, counted by position.
        bytes: Their bytes, with the mapping's weights if these are sent.
        mapped_here: True if the states are mapped before they travel.
    """

    states: int
    bytes: int
    mapped_here: bool


def _sent(planned: Plan, step: Step, mapping: ResolvedMapping) -> _Sent:
    """Predict `in_place_of`."""
    read_width, written_width = _widths(planned)
    states, number = _positions(step.numbers), planned.sweep.source.bytes_per_number
    here = maps_here(
        mapping.kind,
        mapping.call,
        states=states * read_width * number,
        mapped=states * written_width * number,
        shared=bool(step.carried or step.kept) or _is_made(planned),
    )
    if here:
        return _Sent(states, states * written_width * number, mapped_here=True)
    return _Sent(states, states * read_width * number + weights(mapping.call), mapped_here=False)


def _pairs_sent(planned: Plan, step: Step, mapping: ResolvedMapping) -> _Sent:
    """Predict `in_place_of` for a mapping that has weights for each pair of layers."""
    read_width, written_width = _widths(planned)
    number = planned.sweep.source.bytes_per_number
    uses = {
        (State(cell.source, cell.source_positions, pair[0]), pair)
        for cell in step.cells
        for pair in planned.sweep.pairs(cell)
        if isinstance(cell.source, int) and cell.source_positions is not None
    }
    left = {state for state, _ in uses} - set(step.kept)
    states, stays = _positions(step.numbers), _positions(left)
    results = sum(len(state.positions) for state, _ in uses)
    sent = weights(mapping.within(pair for _, pair in uses))
    mapped, raw = results * written_width * number, stays * read_width * number
    if uses and not _is_made(planned) and mapped <= raw + sent:
        others = states - stays
        return _Sent(others + results, others * read_width * number + mapped, mapped_here=True)
    return _Sent(states, states * read_width * number + sent, mapped_here=False)


def _is_made(planned: Plan) -> bool:
    """True if states are made of several, or come from files; these cannot be mapped before they travel."""
    source, target = planned.sweep.scope.source, planned.sweep.scope.target
    return any((source.vector, source.minus, source.mean, target.soft_prompt))


def _widths(planned: Plan) -> tuple[int, int]:
    """The sizes of the states that are read, and of those that are written."""
    sweep = planned.sweep
    read, written = SITES[sweep.scope.source.site], SITES[sweep.scope.target.site]
    return sweep.source.width(read), sweep.target.width(written)


def _positions(states: Iterable[State]) -> int:
    """The number of hidden states, counted by position."""
    return sum(len(state.positions) for state in states if state.layer is not None)


def size(states: Mapping[Any, torch.Tensor]) -> int:
    """The size of tensors in bytes."""
    return sum(state.numel() * state.element_size() for state in states.values())


def weights(call: Any) -> int:
    """The size of a mapping's weights in bytes; 0 for a function."""
    if isinstance(call, Mapping):
        return sum(size(parts) for parts in call.values())
    if not isinstance(call, torch.nn.Module):
        return 0
    return size(dict(enumerate([*call.parameters(), *call.buffers()])))
