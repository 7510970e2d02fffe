"""A step of two models, cut into the half that reads the source and the half that writes the target.

States cross as values. A mapping of the user's own runs on this side of the crossing where that sends fewer
bytes: its weights then stay here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch

from patchscope_nn.body.program import Work
from patchscope_nn.mappings import Pair, ResolvedMapping, apply_mapping
from patchscope_nn.plan import Plan, State, Step
from patchscope_nn.spec import SITES

#: The bytes of a log-probability; they are float32 whatever the model is.
_LOGPROB = 4
#: A state, by number, and the (l, l*) it is written for.
Use: TypeAlias = tuple[int, Pair]


class Crossing(NamedTuple):
    """What crosses to the target with a step.

    Attributes:
        states: The source's states, or these mapped, and its distributions: tensors by number.
        mapping: What is left to do to them there, as in a step's `how`.
        renumbered: Where a state is mapped here once for each pair of layers, the number of each.
        left: The numbers of the states that stay here then.
    """

    states: dict[int, torch.Tensor]
    mapping: list[Any]
    renumbered: Mapping[Use, int] = {}
    left: frozenset[int] = frozenset()


def source_half(work: Work) -> Work:
    """What reads the states of a step, and gives all of them back."""
    return {
        **work,
        "targets": [],
        "carried": {},
        "prefix": None,
        "keep": work["fresh"],
        "sums": [],
        "how": {**work["how"], "mapping": ["identity", None]},
    }


def target_half(work: Work, crossing: Crossing) -> Work:
    """What writes the states that crossed."""
    known = {number: state for number, state in work["carried"].items() if number not in crossing.left}
    return {
        **work,
        "sources": [],
        "targets": [_renumbered(one, crossing.renumbered) for one in work["targets"]],
        "carried": {**known, **crossing.states},
        "how": {**work["how"], "mapping": crossing.mapping},
    }


def _renumbered(one: Work, numbers: Mapping[Use, int]) -> Work:
    """A target pass that writes states which were mapped here for their own pair of layers."""
    if not numbers:
        return one
    writes = [
        [layer, [{**entry, "state": numbers[entry["state"], tuple(entry["pair"])]} for entry in entries]]
        for layer, entries in one["writes"]
    ]
    return {**one, "writes": writes}


def in_place_of(work: Work, states: Mapping[int, torch.Tensor]) -> Crossing:
    """Map states here, where that sends fewer bytes than to send them with their mapping.

    Args:
        work: The step.
        states: What its source gave: hidden states and distributions, by number.

    Returns:
        What crosses.
    """
    kind, call = work["how"]["mapping"]
    if kind == "pairs":
        return _in_place_of_pairs(work, states)
    numbers = {entry[0] for one in work["sources"] for _, reads in one["reads"] for entry in reads}
    hidden = {number: states[number] for number in numbers if number in states}
    mapped = {}
    for number, state in hidden.items() if kind == "call" else ():
        with torch.no_grad():
            mapped[number] = apply_mapping(kind, call, state, state.new_zeros(()))
    # What is added up, is mapped afterwards.
    shared = bool(work["carried"] or work["keep"] or work["sums"])
    if maps_here(kind, call, states=size(hidden), mapped=size(mapped), shared=shared):
        return Crossing({**states, **mapped}, ["identity", None])
    return Crossing(dict(states), work["how"]["mapping"])


def _in_place_of_pairs(work: Work, states: Mapping[int, torch.Tensor]) -> Crossing:
    """The same, of a mapping with weights for each pair of layers: a state may be mapped several times."""
    maps, known = work["how"]["mapping"][1], {**work["carried"], **states}
    uses: list[Use] = sorted(
        {
            (entry["state"], tuple(entry["pair"]))
            for one in work["targets"]
            for _, entries in one["writes"]
            for entry in entries
            if entry["state"] is not None
        }
    )
    if work["sums"]:  # what is added up, is mapped afterwards
        return Crossing(dict(states), work["how"]["mapping"])
    renumbered = {use: number for number, use in enumerate(uses, start=max(known, default=-1) + 1)}
    with torch.no_grad():
        mapped = {
            renumbered[number, pair]: apply_mapping(
                "pairs", maps, known[number], known[number].new_zeros(()), [pair] * len(known[number])
            )
            for number, pair in uses
        }
    left = frozenset(number for number, _ in uses) - frozenset(work["keep"])
    stays = size({number: known[number] for number in left})
    if not uses or size(mapped) > stays + weights(maps):
        return Crossing(dict(states), work["how"]["mapping"])
    sent = {number: state for number, state in states.items() if number not in left}
    return Crossing({**sent, **mapped}, ["identity", None], renumbered, left)


def maps_here(kind: str, call: Any, *, states: int, mapped: int, shared: bool) -> bool:
    """Whether a step's states are mapped before they cross: where they are then no more bytes.

    Args:
        kind: The kind of the mapping.
        call: Its function.
        states: The bytes of the hidden states.
        mapped: Their bytes once they are mapped.
        shared: Whether another step uses some of them, which are mapped once, there.
    """
    return kind == "call" and states > 0 and not shared and mapped <= states + weights(call)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What crosses to M* in all steps of a plan.

    Attributes:
        steps: Steps with anything that crosses.
        states: Hidden states that cross, one for each position.
        distributions: Next-token distributions of M that cross.
        bytes: All of it, with the mapping's weights where they cross.
        mapped_here: Steps whose states are mapped before they cross.
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
    """What will cross between two models, before anything runs; None where they share a context.

    Args:
        planned: The plan.
        mapping: f.
    """
    if planned.context != "bridged":
        return None
    source = planned.sweep.source
    asked, written = planned.sweep.scope.source, planned.sweep.scope.target
    read_width, written_width = _widths(planned)
    made = any((asked.vector, asked.minus, asked.mean, written.soft_prompt))
    found = Traffic(mapping=mapping.name, weights=weights(mapping.maps or mapping.call))
    for step in planned.steps():
        if mapping.kind == "pairs":
            found = _with_pairs(found, planned, step, mapping, made=made)
            continue
        fresh = [state for one in step.sources for state in one.states]
        crossing = [*step.carried, *fresh]
        hidden = sum(len(state.positions) for state in crossing if state.layer is not None)
        finals = sum(state.layer is None for state in crossing)
        number = source.bytes_per_number
        mapped_here = maps_here(
            mapping.kind,
            mapping.call,
            states=hidden * read_width * number,
            mapped=hidden * written_width * number,
            shared=bool(step.carried or step.kept) or made,
        )
        width = written_width if mapped_here else read_width
        found = replace(
            found,
            steps=found.steps + bool(crossing),
            states=found.states + hidden,
            distributions=found.distributions + finals,
            bytes=found.bytes
            + hidden * width * number
            + finals * source.vocab_size * _LOGPROB
            + (0 if mapped_here else found.weights),
            mapped_here=found.mapped_here + mapped_here,
        )
    return found


def _with_pairs(
    found: Traffic, planned: Plan, step: Step, mapping: ResolvedMapping, *, made: bool
) -> Traffic:
    """What crosses with one more step, of a mapping with weights for each pair of layers."""
    source = planned.sweep.source
    read_width, written_width = _widths(planned)
    crossing = {*step.carried, *(state for one in step.sources for state in one.states)}
    uses = {
        (State(cell.source_prompt, cell.source_positions, pair[0]), pair)
        for cell in step.cells
        for pair in planned.sweep.pairs(cell)
        if cell.source_prompt is not None and cell.source_positions is not None
    }
    left = {state for state, _ in uses} - set(step.kept)
    number, finals = source.bytes_per_number, sum(state.layer is None for state in crossing)
    sent = weights(mapping.within(pair for _, pair in uses))
    stays = _positions(left)
    maps_here = sum(len(state.positions) for state, _ in uses)
    mapped, raw = maps_here * written_width * number, stays * read_width * number
    here = bool(uses) and not made and mapped <= raw + sent
    hidden = _positions(crossing) - (stays if here else 0)
    return replace(
        found,
        steps=found.steps + bool(crossing),
        states=found.states + hidden + (maps_here if here else 0),
        distributions=found.distributions + finals,
        bytes=found.bytes
        + hidden * read_width * number
        + (mapped if here else sent)
        + finals * source.vocab_size * _LOGPROB,
        mapped_here=found.mapped_here + here,
    )


def _widths(planned: Plan) -> tuple[int, int]:
    """The sizes of the states that are read, and of those that are written."""
    sweep = planned.sweep
    read, written = SITES[sweep.scope.source.site], SITES[sweep.scope.target.site]
    return sweep.source.width(read), sweep.target.width(written)


def _positions(states: Iterable[State]) -> int:
    """How many hidden states they are, one for each position."""
    return sum(len(state.positions) for state in states if state.layer is not None)


def size(states: Mapping[int, torch.Tensor]) -> int:
    """The bytes of tensors."""
    return sum(state.numel() * state.element_size() for state in states.values())


def weights(call: Any) -> int:
    """The bytes of a mapping's weights; 0 of a function's."""
    if isinstance(call, Mapping):
        return sum(one.numel() * one.element_size() for parts in call.values() for one in parts.values())
    if not isinstance(call, torch.nn.Module):
        return 0
    return sum(one.numel() * one.element_size() for one in (*call.parameters(), *call.buffers()))
