"""Attention to a prefix that is shared, and to few other tokens, inside a context.

With a mask over one long sequence, attention would grow with the square of its tokens; with a copy of the
prefix in each row, so would its memory. Here all queries attend to the prefix in one product without a mask,
and to their own tokens separately. The two results are joined by the normalisers of their softmaxes. A block
still calls PyTorch's `scaled_dot_product_attention`; the context below replaces that function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from patchscope_nn.body.devices import in_sent
from patchscope_nn.body.program import PackedProgram


def in_attending(attend: Callable[..., torch.Tensor]) -> Any:
    """Return a context in which blocks compute their attention with another function.

    Args:
        attend: The function: `attend(layer, queries, scale)`; queries (batch, n_heads, n_tokens, d_head).

    Returns:
        The context. Its `layer` must be set before a block calls its attention; its `calls` counts how often
        blocks have called it.
    """

    def __torch_function__(  # noqa: N807 (torch calls it so)
        mode: Any, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        mode.calls += 1
        return attend(mode.layer, args[0], kwargs.get("scale"))

    # The class is made here, since servers do not have the classes of this package.
    attending_class = type("Attending", (TorchFunctionMode,), {"__torch_function__": __torch_function__})
    attending = attending_class()
    attending.layer = attending.calls = 0
    return attending


def in_own_tokens(target: PackedProgram, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n_tokens, n_own) the tokens after the prefix that each token attends to, and which are real."""
    starts, trunks, seen = (in_sent(target[name][:, None], device) for name in ("starts", "trunks", "seen"))
    token = torch.arange(len(starts), device=device)[:, None]
    place = torch.arange(target["most_own"] or 0, device=device)
    real = place < seen + token + 1 - starts
    places = torch.where(place < seen, trunks + place, starts + place - seen)
    return places.masked_fill(~real, 0), real


def in_packed_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: int,
    own: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float | None,
) -> torch.Tensor:
    """Compute the attention of each token of a packed sequence to a prefix and to its own tokens.

    Args:
        queries: (1, n_heads, n_tokens, d_head).
        keys: (1, n_kv_heads, prefix + n_tokens, d_head).
        values: The same shape.
        prefix: How many keys, the first ones, every token attends to.
        own: As from `in_own_tokens`, for n_tokens or more.
        scale: The factor of the products of queries and keys; None is d_head ** -0.5.

    Returns:
        (1, n_heads, n_tokens, d_head).
    """
    _, heads, count, size = queries.shape
    groups = keys.shape[1]
    scale = size**-0.5 if scale is None else scale
    queries = queries.reshape(groups, heads // groups, count, size)
    seen, norm = _in_own(queries, keys[0, :, prefix:], values[0, :, prefix:], own, scale)
    if prefix:
        folded = queries.flatten(1, 2)[None]
        shared, shared_norm = _in_prefix(folded, keys[:, :, :prefix], values[:, :, :prefix], scale)
        seen = _in_joined(seen, norm, shared.view_as(queries), shared_norm.view_as(norm))
    return seen.reshape(1, heads, count, size)


def in_row_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float | None,
) -> torch.Tensor:
    """Compute the attention of rows to a prefix that all share, and of each row to its own tokens.

    Args:
        queries: (n_rows, n_heads, n_tokens, d_head), of the last tokens of each row.
        keys: (n_rows, n_kv_heads, n_own, d_head), those of the row's own tokens.
        values: The same shape.
        prefix: Keys and values of the prefix, each (1, n_kv_heads, n_prefix, d_head).
        scale: As in `in_packed_attention`.

    Returns:
        (n_rows, n_heads, n_tokens, d_head).
    """
    rows, heads, count, size = queries.shape
    groups, n_own = keys.shape[1:3]
    scale = size**-0.5 if scale is None else scale
    grouped = queries.reshape(rows, groups, -1, size)
    # In half precision, a product would be rounded before its softmax.
    numbers = torch.promote_types(queries.dtype, torch.float32)
    scores = torch.matmul(grouped.to(numbers), keys.to(numbers).transpose(2, 3)) * scale
    if count > 1:
        later = torch.ones(count, n_own, dtype=torch.bool, device=keys.device).triu(n_own - count + 1)
        scores = scores.view(rows, groups, -1, count, n_own).masked_fill(later, -torch.inf).flatten(2, 3)
    norm = scores.logsumexp(-1, keepdim=True)
    seen = torch.matmul((scores - norm).exp().to(values), values)
    folded = grouped.transpose(0, 1).reshape(1, groups, -1, size)
    shared, shared_norm = _in_prefix(folded, *prefix, scale)
    of_rows = (
        part.view(groups, rows, grouped.shape[2], -1).transpose(0, 1) for part in (shared, shared_norm)
    )
    return _in_joined(seen, norm, *of_rows).reshape(rows, heads, count, size)


def _in_prefix(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of queries to all keys, and the logarithm of its normaliser.

    Args:
        queries: (1, n_kv_heads, n, d_head).
        keys: (1, n_kv_heads, n_prefix, d_head).
        values: The same shape.
        scale: The factor of the products.

    Returns:
        (1, n_kv_heads, n, d_head) and (1, n_kv_heads, n).
    """
    # PyTorch's public function does not return the normaliser, so its fused kernels are called directly.
    kernel = _KERNELS.get(queries.device.type, _in_products)
    return kernel(queries, keys, values, scale)


def _in_flash(queries: Any, keys: Any, values: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `_in_prefix` on a CPU."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 (public functions return no normaliser)
    seen, norm = kernel(queries, keys, values, 0.0, False, scale=scale)
    return seen, norm


def _in_efficient(queries: Any, keys: Any, values: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `_in_prefix` on a CUDA device, in any dtype; the normaliser is padded."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001 (public functions return no normaliser)
    seen, norm, *_ = kernel(queries, keys, values, None, True, scale=scale)
    return seen, norm[:, :, : queries.shape[2]]


def _in_products(queries: Any, keys: Any, values: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `_in_prefix` on any device, with memory for each pair of a query and a key."""
    scores = torch.matmul(queries, keys.transpose(2, 3)).float() * scale
    norm = scores.logsumexp(-1)
    return torch.matmul((scores - norm[..., None]).exp().to(values), values), norm


#: By the type of the device.
_KERNELS = {"cpu": _in_flash, "cuda": _in_efficient}


def _in_joined(
    seen: torch.Tensor, norm: torch.Tensor, other: torch.Tensor, other_norm: torch.Tensor
) -> torch.Tensor:
    """Join attention to some keys and to others; the logarithms of the normalisers are (..., 1)."""
    return torch.lerp(other, seen, torch.sigmoid(norm - other_norm).to(seen))


def _in_own(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of each token to its own tokens, and the logarithm of its normaliser.

    Queries are (n_kv_heads, heads of each, n_tokens, d_head), keys and values (n_kv_heads, n_tokens, d_head).
    """
    count = queries.shape[2]
    places, real = own
    columns = places[:count].unbind(1)
    scores = torch.stack([(queries * keys[:, None, column]).sum(-1) for column in columns], dim=-1)
    scores = (scores.float() * scale).masked_fill(~real[:count], -torch.inf)
    norm = scores.logsumexp(-1, keepdim=True)
    weights = (scores - norm).exp().to(values)
    seen = sum(weights[..., place, None] * values[:, None, column] for place, column in enumerate(columns))
    return seen, norm
