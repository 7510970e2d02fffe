"""Attention of tokens that share a prefix and attend to few other tokens, inside a context.

With a mask over the whole sequence, attention would grow with the square of its tokens. Here all tokens
attend to the prefix in one product without a mask, and each token's other keys are gathered by index. The two
results are joined by the normalisers of their softmaxes. A block still calls PyTorch's
`scaled_dot_product_attention`; the context below replaces that function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from patchscope_nn.body.program import PackedProgram


def in_attending(cache: Any, target: PackedProgram) -> Any:
    """Return a context in which block `layer` attends to the prefix and to each token's own ones separately.

    Args:
        cache: The keys and values of all blocks; attention is to these.
        target: The pass, which says what each token attends to.

    Returns:
        The context. Set its `layer`, then enter it to call that block; its `calls` counts how often blocks
        have called the attention function.
    """
    prefix, own = target["prefix"], in_own_tokens(target)

    def __torch_function__(  # noqa: N807 (torch calls it so)
        mode: Any, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        mode.calls += 1
        kept = cache.layers[mode.layer]
        return in_attention(args[0], kept.keys, kept.values, prefix, own, scale=kwargs.get("scale"))

    # The class is made here, since servers do not have the classes of this package.
    attending_class = type("Attending", (TorchFunctionMode,), {"__torch_function__": __torch_function__})
    attending = attending_class()
    attending.layer = attending.calls = 0
    return attending


def in_own_tokens(target: PackedProgram) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n_tokens, n_own) the tokens after the prefix that each token attends to, and which are real."""
    starts, trunks, seen = (target[name][:, None] for name in ("starts", "trunks", "seen"))
    token, place = torch.arange(len(starts))[:, None], torch.arange(target["most_own"] or 0)
    real = place < seen + token + 1 - starts
    places = torch.where(place < seen, trunks + place, starts + place - seen)
    return places.masked_fill(~real, 0), real


def in_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: int,
    own: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float | None,
) -> torch.Tensor:
    """Compute the attention of each token to a prefix and to its own tokens.

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
        # PyTorch has no public function that also returns the normaliser.
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
