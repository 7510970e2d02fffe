"""A Llama-like model as its bare modules: what the floor is built from. No nnsight, no transformers' forward.

Tokens of all rows are one (n_tokens, d_model) matrix, whatever rows they belong to: only attention asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes that are fastest on a device.

    Attributes:
        tokens: The most tokens of a matrix product.
        rows: The most rows that decode together.
        tile_bytes: The logits that are computed together, in bytes: the vocabulary is unembedded in tiles.
    """

    tokens: int
    rows: int
    tile_bytes: int


#: With more, the tokens or logits no longer fit the processor's cache.
_PROCESSOR = Limits(tokens=1024, rows=960, tile_bytes=2**21)
#: With less, the device waits for the host to start its kernels.
_ACCELERATOR = Limits(tokens=16_384, rows=4096, tile_bytes=2**29)


@dataclass(frozen=True)
class Projected:
    """Queries, (n_tokens, n_heads, d_head), and keys and values, (n_tokens, n_kv_heads, d_head)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class Bare:
    """The modules of a Llama-like model.

    Attributes:
        blocks: The decoder blocks.
        depth: How many.
        n_heads: Query heads.
        n_kv_heads: Key and value heads.
        scale: What products of queries and keys are multiplied with.
        device: Where its weights are.
        limits: The sizes that are fastest there.
    """

    def __init__(self, module: Any) -> None:
        decoder, config = module.get_decoder(), module.config
        self.embed, self.blocks, self.norm = decoder.embed_tokens, decoder.layers, decoder.norm
        self.unembed, self.rotary = module.get_output_embeddings(), decoder.rotary_emb
        self.depth, attention = len(self.blocks), self.blocks[0].self_attn
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.d_head, self.scale = attention.head_dim, attention.scaling
        self.device = self.embed.weight.device
        self.limits = _PROCESSOR if self.device.type == "cpu" else _ACCELERATOR

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary cosines and sines of (n_tokens,) positions, (n_tokens, 1, d_head)."""
        cos, sin = self.rotary(self.embed.weight[:1, None], positions[None].to(self.device))
        return cos[0, :, None], sin[0, :, None]

    def keys_values(
        self, layer: int, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of normed (n_tokens, d_model), each (n_tokens, n_kv_heads, d_head)."""
        attention = self.blocks[layer].self_attn
        keys = attention.k_proj(normed).view(-1, self.n_kv_heads, self.d_head)
        return _rotate(keys, cos, sin), attention.v_proj(normed).view_as(keys)

    def queries(self, layer: int, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries of normed (n_tokens, d_model), (n_tokens, n_heads, d_head)."""
        queries = self.blocks[layer].self_attn.q_proj(normed)
        return _rotate(queries.view(-1, self.n_heads, self.d_head), cos, sin)

    def block(
        self,
        layer: int,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        attend: Callable[[Projected], torch.Tensor],
        *,
        asked: torch.Tensor | slice | None = None,
    ) -> torch.Tensor:
        """One block.

        Args:
            layer: Which.
            hidden: (n_tokens, d_model).
            angles: What `angles` gave.
            attend: From the projected tokens to what each asked one sees, (n_asked, n_heads * d_head).
            asked: The tokens whose output is wanted; the others give keys and values only. None is all.

        Returns:
            (n_asked, d_model).
        """
        block, (cos, sin) = self.blocks[layer], angles
        normed = block.input_layernorm(hidden)
        keys, values = self.keys_values(layer, normed, cos, sin)
        if asked is not None:
            hidden, normed = hidden[asked], normed[asked]
            cos, sin = (cos, sin) if len(cos) == 1 else (cos[asked], sin[asked])
        seen = attend(Projected(self.queries(layer, normed, cos, sin), keys, values))
        hidden = hidden + block.self_attn.o_proj(seen)
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    def next_token(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The top token after each of (n, d_model) last states, and its log-probability, each (n,)."""
        normed, weight, bias = self.norm(hidden), self.unembed.weight, self.unembed.bias
        step = max(self.limits.tile_bytes // (weight.element_size() * max(len(normed), 1)), 256)
        tops, ids, sums = [], [], []
        for first in range(0, len(weight), step):
            tile = slice(first, first + step)
            logits = linear(normed, weight[tile], None if bias is None else bias[tile])
            top, place = logits.max(-1)
            tops.append(top)
            ids.append(place + first)
            sums.append(logits.sub_(top[:, None]).exp_().sum(-1, dtype=torch.float32))
        each = torch.stack(tops).float()
        top, tile_of = each.max(0)
        total = (torch.stack(sums) * (each - top).exp()).sum(0)
        return torch.stack(ids).gather(0, tile_of[None])[0], -total.log()

    def top_token(self, hidden: torch.Tensor) -> torch.Tensor:
        """The top token alone, (n,): decoding needs no log-probability."""
        normed, weight, bias = self.norm(hidden), self.unembed.weight, self.unembed.bias
        step = max(self.limits.tile_bytes // (weight.element_size() * max(len(normed), 1)), 256)
        tops, ids = [], []
        for first in range(0, len(weight), step):
            tile = slice(first, first + step)
            top, place = linear(normed, weight[tile], None if bias is None else bias[tile]).max(-1)
            tops.append(top)
            ids.append(place + first)
        return torch.stack(ids).gather(0, torch.stack(tops).argmax(0)[None])[0]


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin
