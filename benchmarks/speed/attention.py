"""Attention for the floor: rows that share the keys and values of a prefix and have a few of their own.

The shared part is one product for all rows, and no row's copy of it is ever made; the two parts are joined by
their softmax's normalisers. Beside one packed sequence with a mask, or a copy of the prefix in every row, it
is 4 to 20 times faster.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

_OPERATORS = torch.ops.aten  # PyTorch has no public function that also returns the normaliser
#: Up to so many shared keys plain products beat the fused kernel, where rows have several of their own.
_FEW = 64


class Shared(NamedTuple):
    """Keys and values of the tokens that all rows see, each (n_kv_heads, n_tokens, d_head)."""

    keys: torch.Tensor
    values: torch.Tensor


class Own(NamedTuple):
    """Keys and values of each row's own tokens, each (n_rows, n_kv_heads, n_own, d_head)."""

    keys: torch.Tensor
    values: torch.Tensor


def causal(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention within rows of one length, of all tokens or of the last alone.

    Args:
        queries: (n_rows, n_asked, n_heads, d_head); n_asked is n_tokens or 1.
        keys: (n_rows, n_tokens, n_kv_heads, d_head).
        values: The same.
        scale: What products of queries and keys are multiplied with.

    Returns:
        (n_rows * n_asked, n_heads * d_head).
    """
    rows, asked, heads, size = queries.shape
    seen = scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        is_causal=asked > 1,
        scale=scale,
        enable_gqa=True,
    )
    return seen.transpose(1, 2).reshape(rows * asked, heads * size)


def branching(queries: torch.Tensor, own: Own, shared: Shared, scale: float) -> torch.Tensor:
    """Attention of rows to what they share and to their own tokens.

    Args:
        queries: (n_rows, n_asked, n_heads, d_head), of each row's last tokens.
        own: Each row's own keys and values, those of the asked tokens included.
        shared: Everybody's.
        scale: What products of queries and keys are multiplied with.

    Returns:
        (n_rows * n_asked, n_heads * d_head).
    """
    rows, asked, heads, size = queries.shape
    groups, n_own = own.keys.shape[1:3]
    # (n_rows, n_kv_heads, n_asked * queries of one key head, d_head)
    queries = queries.view(rows, asked, groups, -1, size).transpose(1, 2).reshape(rows, groups, -1, size)
    if n_own == 1:
        scores = (queries * own.keys).sum(-1, keepdim=True, dtype=torch.float32) * scale
        seen = _joined(*_shared(queries, shared, scale), own.values, scores)
    else:
        scores = (queries @ own.keys.transpose(2, 3)).float().mul_(scale)
        if asked > 1:
            scores += _later(asked, n_own, queries.shape[2] // asked).to(scores.device)
        join = _products if shared.keys.shape[1] <= _FEW else _normalised
        seen = join(queries, scores, own, shared, scale)
    seen = seen.view(rows, groups, asked, -1, size).transpose(1, 2)
    return seen.reshape(rows * asked, heads * size)


def _later(asked: int, n_own: int, times: int) -> torch.Tensor:
    """What bars the last `asked` of n_own tokens from those after them, (asked * times, n_own)."""
    barred = torch.full((asked, n_own), -torch.inf).triu(n_own - asked + 1)
    return barred.repeat_interleave(times, 0)


def _flat(queries: torch.Tensor) -> torch.Tensor:
    """All rows' queries behind each other, (n_kv_heads, n_rows * n, d_head)."""
    rows, groups, count, size = queries.shape
    return queries.transpose(0, 1).reshape(groups, rows * count, size)


def _shared(queries: torch.Tensor, shared: Shared, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the shared tokens alone, and the logarithm of its normaliser."""
    rows, groups, count, size = queries.shape
    given = (_flat(queries)[None], shared.keys[None], shared.values[None])
    seen, norm = _unmasked(*given, scale)
    seen = seen.view(groups, rows, count, size).transpose(0, 1)
    return seen, norm.reshape(groups, rows, count, 1).transpose(0, 1)


def _unmasked(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of (1, n_heads, n_tokens, d_head) without a mask, and the logarithm of its normaliser."""
    if queries.device.type == "cpu":
        flash = _OPERATORS._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 (public functions return no normaliser)
        return flash(queries, keys, values, 0.0, False, scale=scale)[:2]
    if queries.dtype == torch.float32:  # the flash kernel computes in half precision only
        efficient = _OPERATORS._scaled_dot_product_efficient_attention  # noqa: SLF001 (public functions return no normaliser)
        seen, norm, *_ = efficient(queries, keys, values, None, True, 0.0, False, scale=scale)
        return seen, norm[..., : queries.shape[2]]  # it pads the tokens
    flash = _OPERATORS._scaled_dot_product_flash_attention  # noqa: SLF001 (public functions return no normaliser)
    return flash(queries, keys, values, 0.0, False, False, scale=scale)[:2]


def _joined(
    seen: torch.Tensor, norm: torch.Tensor, own_seen: torch.Tensor, own_norm: torch.Tensor
) -> torch.Tensor:
    """Two attentions as one: each counts by its normaliser."""
    return torch.lerp(seen, own_seen.expand_as(seen), torch.sigmoid(own_norm - norm).to(seen))


def _normalised(
    queries: torch.Tensor, scores: torch.Tensor, own: Own, shared: Shared, scale: float
) -> torch.Tensor:
    norm = scores.logsumexp(-1, keepdim=True)
    return _joined(*_shared(queries, shared, scale), (scores - norm).exp_().to(own.values) @ own.values, norm)


def _products(
    queries: torch.Tensor, scores: torch.Tensor, own: Own, shared: Shared, scale: float
) -> torch.Tensor:
    rows, groups, count, size = queries.shape
    n_shared = shared.keys.shape[1]
    of_shared = (_flat(queries) @ shared.keys.transpose(1, 2)).mul_(scale)
    of_shared = of_shared.view(groups, rows, count, n_shared).transpose(0, 1)
    weights = torch.cat([of_shared, scores], -1).softmax(-1).to(queries)
    seen = (_flat(weights[..., :n_shared]) @ shared.values).view(groups, rows, count, size)
    return seen.transpose(0, 1) + weights[..., n_shared:] @ own.values
