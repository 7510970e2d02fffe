"""A step of two models, cut into the half that reads the source and the half that writes the target.

States cross as values. A mapping of the user's own runs on this side of the crossing where that sends fewer
bytes: its weights then stay here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from patchscope_nn.mappings import apply_mapping
from patchscope_nn.unpack import Work


class Crossing(NamedTuple):
    """What crosses to the target with a step.

    Attributes:
        states: The source's states, or these mapped, and its distributions: tensors by number.
        mapping: What is left to do to them there, as in a step's `mapping`.
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
        "mapping": ["identity", None],
    }


def target_half(work: Work, crossing: Crossing) -> Work:
    """What writes the states that crossed."""
    carried = {**work["carried"], **crossing.states}
    return {**work, "sources": [], "carried": carried, "mapping": crossing.mapping}


def in_place_of(work: Work, states: Mapping[int, torch.Tensor]) -> Crossing:
    """Map states here, where that sends fewer bytes than to send them with their mapping.

    Args:
        work: The step.
        states: What its source gave: hidden states and distributions, by number.

    Returns:
        What crosses.
    """
    kind, call = work["mapping"]
    numbers = {entry[0] for one in work["sources"] for _, reads in one["reads"] for entry in reads}
    hidden = {number: states[number] for number in numbers if number in states}
    if kind != "call" or not hidden or work["carried"]:
        return Crossing(dict(states), work["mapping"])
    mapped = {}
    for number, state in hidden.items():
        with torch.no_grad():
            mapped[number] = apply_mapping(kind, call, state, state.new_zeros(()))
    if size(mapped) > size(hidden) + weights(call):
        return Crossing(dict(states), work["mapping"])
    return Crossing({**states, **mapped}, ["identity", None])


def size(states: Mapping[int, torch.Tensor]) -> int:
    """The bytes of tensors."""
    return sum(state.numel() * state.element_size() for state in states.values())


def weights(call: Any) -> int:
    """The bytes of a mapping's weights; 0 of a function's."""
    if not isinstance(call, torch.nn.Module):
        return 0
    return sum(one.numel() * one.element_size() for one in (*call.parameters(), *call.buffers()))
