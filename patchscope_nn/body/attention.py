"""Attention of tokens that share a prefix and see few others, inside a context.

As one sequence with a mask, attention grows with the square of its tokens. Here the prefix is one product for
all of them, without a mask; what else a token sees is picked out; and the two are joined by the normalisers
of their softmaxes. A block still calls PyTorch's `scaled_dot_product_attention`, and this stands in for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from patchscope_nn.body.program import OwnTokens


def in_attending(cache: Any, prefix: int, own: OwnTokens) -> Any:
    """A context in which the block of its `layer` attends so.

    Args:
        cache: The keys and values the blocks keep; attention is to these.
        prefix: How many of them, the first ones, every token sees.
        own: What else each token sees.

    Returns:
        The context, to be entered once a block: set `layer` before, and find in `calls` how often a block
        has asked for its attention.
    """

    def __torch_function__(  # noqa: N807 (torch calls it so)
        mode: Any, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **given)
        mode.calls += 1
        kept = cache.layers[mode.layer]
        return in_attention(args[0], kept.keys, kept.values, prefix, own, scale=given.get("scale"))

    # Made here, and not as a class of this package, which no server has.
    made = type("Attending", (TorchFunctionMode,), {"__torch_function__": __torch_function__})
    attending = made()
    attending.layer = attending.calls = 0
    return attending


def in_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: int,
    own: OwnTokens,
    *,
    scale: float | None,
) -> torch.Tensor:
    """Attention of each token to a prefix and to its own tokens.

    Args:
        queries: (1, n_heads, n_tokens, d_head).
        keys: (1, n_kv_heads, prefix + n_tokens, d_head).
        values: The same.
        prefix: How many keys, the first ones, every token sees.
        own: The tokens behind the prefix that each one attends to, for n_tokens or more.
        scale: What products of queries and keys are multiplied with; None is d_head ** -0.5.

    Returns:
        (1, n_heads, n_tokens, d_head).
    """
    _, heads, count, size = queries.shape
    groups = keys.shape[1]
    scale = size**-0.5 if scale is None else scale
    queries = queries.reshape(groups, heads // groups, count, size)
    seen, norm = _in_own(queries, keys[0, :, prefix:], values[0, :, prefix:], own, scale)
    if prefix:
        # PyTorch has no public function that gives the normaliser too.
        shared, shared_norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
            queries.flatten(1, 2)[None], keys[:, :, :prefix], values[:, :, :prefix], 0.0, False, scale=scale
        )
        weight = torch.sigmoid(norm - shared_norm.view_as(norm))
        seen = torch.lerp(shared.view_as(queries), seen, weight.to(seen))
    return seen.reshape(1, heads, count, size)


def _in_own(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own: OwnTokens,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each token to its own ones, and the logarithm of the normaliser.

    Queries are (n_kv_heads, n_heads of each, n_tokens, d_head), keys and values without the second.
    """
    count = queries.shape[2]
    columns = own["places"][:count].unbind(1)
    scores = torch.stack([(queries * keys[:, None, column]).sum(-1) for column in columns], dim=-1)
    scores = (scores.float() * scale).masked_fill(~own["real"][:count], -torch.inf)
    norm = scores.logsumexp(-1, keepdim=True)
    weights = (scores - norm).exp().to(values)
    seen = sum(weights[..., place, None] * values[:, None, column] for place, column in enumerate(columns))
    return seen, norm
