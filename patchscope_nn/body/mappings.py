"""Applies a mapping to states, inside a context. These functions travel, with tensors, to where M* runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from patchscope_nn.body.devices import in_sent

#: (l, l*): the layer that is read and the layer that is written; -1 is the input of block 0.
Pair: TypeAlias = tuple[int, int]
#: The tensors of one pair's map, by name: `weight`, `up`, `down`, `scale`, `bias`.
Parts: TypeAlias = Mapping[str, torch.Tensor]


def apply_mapping(
    kind: str,
    call: Any,
    states: torch.Tensor,
    clean: torch.Tensor,
    pairs: Any = None,
) -> torch.Tensor:
    """Map states of the source to states of the target.

    Args:
        kind: The kind of a `ResolvedMapping`.
        call: Its function; for `pairs`, the maps.
        states: (n, d_model) states of the source.
        clean: (n, d_model of the target) the states they will replace.
        pairs: (n, 2) the (l, l*) of each state; needed only for `pairs`.

    Returns:
        (n, d_model of the target), in the dtype and on the device of `clean`.
    """
    if kind == "pairs":
        return map_pairs(call, states, pairs).to(clean)
    if kind == "call":
        if isinstance(call, torch.nn.Module):
            for tensor in [*call.parameters(), *call.buffers()][:1]:
                states = states.to(tensor)
        return call(states).to(clean)
    states = states.to(clean)
    if kind == "target_norm":
        return states * (clean.norm(dim=-1, keepdim=True) / states.norm(dim=-1, keepdim=True))
    return states


def map_pairs(maps: Mapping[Pair, Parts], states: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Map each state by the map of its (l, l*), all states of a pair at once.

    Args:
        maps: The maps.
        states: (n, d_in).
        pairs: (n, 2) the (l, l*) of each state.

    Returns:
        (n, d_out), in the dtype and on the device of the maps.
    """
    distinct, group = pairs.unique(dim=0, return_inverse=True)
    numbers = [(group == number).nonzero()[:, 0] for number in range(len(distinct))]
    mapped = [
        map_parts(maps[layer, target], states[in_sent(index, states.device)])
        for (layer, target), index in zip(distinct.tolist(), numbers, strict=True)
    ]
    together = torch.cat(mapped)
    return together[in_sent(torch.cat(numbers).argsort(), together.device)]


def map_parts(parts: Parts, states: torch.Tensor) -> torch.Tensor:
    """Return f(h) = (weight h | up (down h) | scale h) + bias, for one pair.

    Args:
        parts: The tensors of its map.
        states: (..., d_in).

    Returns:
        (..., d_out), in the dtype and on the device of the tensors.
    """
    for tensor in [*parts.values()][:1]:
        states = states.to(tensor)
    if "weight" in parts:
        mapped = states @ parts["weight"].T
    elif "up" in parts:
        mapped = states @ parts["down"].T @ parts["up"].T
    else:
        mapped = states * parts["scale"]
    return mapped + parts["bias"] if "bias" in parts else mapped
