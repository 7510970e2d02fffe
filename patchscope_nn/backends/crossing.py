"""Divides a step of two models into the half that reads the source and the half that writes the target.

Between the two halves, states travel as values. A mapping of the user's own is applied before they travel if
that sends fewer bytes; then its weights stay here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from patchscope_nn.body.program import PackedProgram, RowsProgram, StepProgram, Write
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
    read = [
        entry["state"]
        for source in program["sources"]
        for entries in (*source["reads"].values(), source["finals"])
        for entry in entries
    ]
    return {
        **program,
        "targets": [],
        "given": {},
        "prefix": None,
        "keep": read,
        "sums": [],
        "writing": {**program["writing"], "mapping": "identity", "weights": None},
    }


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

    def mapped(write: Write) -> Write:
        if write["state"] is None:
            return write
        return {**write, "state": numbers[write["state"], write["pair"]]}

    changed = target.copy()
    changed["writes"] = {layer: [*map(mapped, writes)] for layer, writes in target["writes"].items()}
    return changed


def in_place_of(program: StepProgram, states: Mapping[int, torch.Tensor]) -> Crossing:
    """Map states here, if that sends fewer bytes than sending them with their mapping.

    Args:
        program: The step.
        states: What its source half returned: hidden states and distributions, by number.
    """
    kind, call = program["writing"]["mapping"], program["writing"]["weights"]
    whole = Crossing(dict(states), (kind, call))
    # States are summed before they are mapped, so sums cannot be mapped on this side.
    if program["sums"]:
        return whole
    if kind == "pairs":
        return _in_place_of_pairs(program, states, whole)
    # A state that another step uses too is mapped on the other side.
    if kind != "call" or program["given"] or program["keep"]:
        return whole
    numbers = {
        read["state"] for source in program["sources"] for reads in source["reads"].values() for read in reads
    }
    hidden = {number: states[number] for number in numbers if number in states}
    with torch.no_grad():
        mapped = {
            number: apply_mapping(kind, call, state, state.new_zeros(())) for number, state in hidden.items()
        }
    if not hidden or size(mapped) > size(hidden) + weights(call):
        return whole
    return Crossing({**states, **mapped}, ("identity", None))


def _in_place_of_pairs(program: StepProgram, states: Mapping[int, torch.Tensor], whole: Crossing) -> Crossing:
    """`in_place_of` for a mapping with weights for each pair of layers; a state may be mapped for several."""
    maps, known = program["writing"]["weights"], {**program["given"], **states}
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
    """Predicts what will be sent between two models; None if they share a context."""
    if planned.context != "bridged":
        return None
    steps = [_sent(planned, step, mapping) for step in planned.steps()]
    return Traffic(
        steps=sum(step.steps for step in steps),
        states=sum(step.states for step in steps),
        distributions=sum(step.distributions for step in steps),
        bytes=sum(step.bytes for step in steps),
        mapped_here=sum(step.mapped_here for step in steps),
        mapping=mapping.name,
        weights=weights(mapping.maps or mapping.call),
    )


def _sent(planned: Plan, step: Step, mapping: ResolvedMapping) -> Traffic:
    """Predict `in_place_of`: what a step sends."""
    sweep = planned.sweep
    number = sweep.source.bytes_per_number
    read = number * sweep.source.width(SITES[sweep.scope.source.site])
    written = number * sweep.target.width(SITES[sweep.scope.target.site])
    states = _positions(step.numbers)
    # States that are mapped here: how many they are, how many results they have, and their mapping's weights.
    mapped, results, weighs = states, states, weights(mapping.call)
    possible = mapping.kind == "call" and states > 0 and not (step.carried or step.kept)
    if mapping.kind == "pairs":
        uses = {
            (State(cell.source, cell.source_positions, pair[0]), pair)
            for cell in step.cells
            for pair in sweep.pairs(cell)
            if isinstance(cell.source, int) and cell.source_positions is not None
        }
        mapped = _positions({state for state, _ in uses} - set(step.kept))
        results = sum(len(state.positions) for state, _ in uses)
        weighs, possible = weights(mapping.within(pair for _, pair in uses)), bool(uses)
    here = possible and not _is_made(planned) and results * written <= mapped * read + weighs
    others = states - mapped
    finals = sum(state.layer is None for state in step.numbers)
    sent = others * read + results * written if here else states * read + weighs
    return Traffic(
        steps=bool(step.numbers),
        states=others + results if here else states,
        distributions=finals,
        bytes=sent + finals * sweep.source.vocab_size * _LOGPROB,
        mapped_here=here,
    )


def _is_made(planned: Plan) -> bool:
    """True if states are made of several, or come from files; these cannot be mapped before they travel."""
    source, target = planned.sweep.scope.source, planned.sweep.scope.target
    return any((source.vector, source.minus, source.mean, target.soft_prompt))


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
