"""A step of two models, cut into the half that reads the source and the half that writes the target.

States cross as values. A mapping of the user's own runs on this side of the crossing where that sends fewer
bytes: its weights then stay here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from patchscope_nn.mappings import ResolvedMapping, apply_mapping
from patchscope_nn.plan import Plan
from patchscope_nn.unpack import Work

#: The bytes of a log-probability; they are float32 whatever the model is.
_LOGPROB = 4


class Crossing(NamedTuple):
    """What crosses to the target with a step.

    Attributes:
        states: The source's states, or these mapped, and its distributions: tensors by number.
        mapping: What is left to do to them there, as in a step's `how`.
    """

    states: dict[int, torch.Tensor]
    mapping: list[Any]


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
    carried = {**work["carried"], **crossing.states}
    how = {**work["how"], "mapping": crossing.mapping}
    return {**work, "sources": [], "carried": carried, "how": how}


def in_place_of(work: Work, states: Mapping[int, torch.Tensor]) -> Crossing:
    """Map states here, where that sends fewer bytes than to send them with their mapping.

    Args:
        work: The step.
        states: What its source gave: hidden states and distributions, by number.

    Returns:
        What crosses.
    """
    kind, call = work["how"]["mapping"]
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
        weights: The bytes of the mapping's weights; each step that is not mapped here sends them.
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
    source, target = planned.sweep.source, planned.sweep.target
    asked, written = planned.sweep.scope.source, planned.sweep.scope.target
    made = any((asked.vector, asked.minus, asked.mean, written.soft_prompt))
    found = Traffic(mapping=mapping.name, weights=weights(mapping.call))
    for step in planned.steps():
        fresh = [state for one in step.sources for state in one.states]
        crossing = [*step.carried, *fresh]
        hidden = sum(len(state.positions) for state in crossing if state.layer is not None)
        finals = sum(state.layer is None for state in crossing)
        number = source.bytes_per_number
        mapped_here = maps_here(
            mapping.kind,
            mapping.call,
            states=hidden * source.d_model * number,
            mapped=hidden * target.d_model * number,
            shared=bool(step.carried or step.kept) or made,
        )
        width = target.d_model if mapped_here else source.d_model
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


def size(states: Mapping[int, torch.Tensor]) -> int:
    """The bytes of tensors."""
    return sum(state.numel() * state.element_size() for state in states.values())


def weights(call: Any) -> int:
    """The bytes of a mapping's weights; 0 of a function's."""
    if not isinstance(call, torch.nn.Module):
        return 0
    return sum(one.numel() * one.element_size() for one in (*call.parameters(), *call.buffers()))
