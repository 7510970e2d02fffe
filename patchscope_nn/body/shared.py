"""Decodes rows behind a prefix whose keys and values are held once for all of them, inside a context."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from patchscope_nn.body.attention import in_attending, in_row_attention


def in_shared(model: Any, prefix: Any) -> tuple[Any, Any]:
    """Return the model as a function that decodes behind a prefix, and an empty cache for it.

    The cache holds keys and values of the rows' own tokens, and counts those of the prefix with them. Rows
    have no padding, so the function needs no attention mask.

    Args:
        model: The model.
        prefix: The keys and values of the prefix, of one row.
    """

    def attend(layer: Any, queries: torch.Tensor, scale: float | None) -> torch.Tensor:
        shared = prefix.layers[layer.number]
        return in_row_attention(queries, layer.keys, layer.values, (shared.keys, shared.values), scale=scale)

    def update(layer: Any, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        attending.layer = layer
        return DynamicLayer.update(layer, keys, values)

    def get_seq_length(layer: Any) -> int:
        return length + DynamicLayer.get_seq_length(layer)

    def __deepcopy__(layer: Any, _memo: Any) -> Any:  # noqa: N807 (copy calls it so)
        return copy.copy(layer)  # an update replaces the tensors of a layer, and does not change them

    def forward(attention_mask: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001 (nothing is masked)
        calls = attending.calls
        with attending:
            output = model(**kwargs)
        if attending.calls != calls + len(prefix.layers):
            raise RuntimeError(
                "the blocks do not call their attention once each; run without shared attention"
            )
        return output

    attending, length = in_attending(attend), prefix.get_seq_length()
    functions = (update, get_seq_length, __deepcopy__)
    layer_class = type("SharedLayer", (DynamicLayer,), {part.__name__: part for part in functions})
    cache = DynamicCache()
    cache.layers = []
    for number in range(len(prefix.layers)):
        layer: Any = layer_class()
        layer.number = number
        cache.layers.append(layer)
    return forward, cache
