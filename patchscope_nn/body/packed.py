"""Runs target prompts as segments of one sequence, inside a context.

The model's own forward pass embeds the tokens, computes the arguments of every block, and applies its own
norm and unembedding at the end. In between, it skips its blocks: this module calls each block itself, with
only the tokens that have joined the sequence by then (see `plan/layout.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from patchscope_nn.body.attention import in_attending, in_own_tokens, in_packed_attention
from patchscope_nn.body.devices import in_sent
from patchscope_nn.body.program import PackedProgram, PrefixProgram, SitePath, Writing
from patchscope_nn.body.results import in_pending, in_readout
from patchscope_nn.body.shared import in_shared
from patchscope_nn.body.states import in_blocks, in_write, in_written


def in_prefix(model: Any, prefix: PrefixProgram, site: SitePath) -> Any:
    """Run the tokens that all target prompts of a step begin with, and return their keys and values."""
    if prefix["known"] is not None:
        return prefix["known"]
    # A cache without a config keeps every token in every block; windows are left to the masks.
    cache = DynamicCache()
    with model.trace(**prefix["inputs"], **prefix["options"], past_key_values=cache) as tracer:
        in_blocks(model, site)[-1].output  # noqa: B018 (it waits until the last block has run)
        tracer.stop()
    return cache


def in_packed(
    model: Any,
    target: PackedProgram,
    states: Any,
    site: SitePath,
    writing: Writing,
    *,
    prefix: Any,
    hear: Any,
) -> dict[str, Any]:
    """Run the segments of a pass with states written into them; return its results for `in_results`."""
    writes, readout = target["writes"], target["readout"]
    parts: list[dict[str, torch.Tensor]] = []
    masks: dict[Any, torch.Tensor] = {}
    cache = DynamicCache() if prefix is None else _in_fork(prefix)
    attending = _in_separately(cache, target) if target["most_own"] is not None else None
    with model.trace(**target["inputs"], **target["options"], past_key_values=cache) as tracer:
        blocks = in_blocks(model, site)
        for layer in range(target["depth"]):
            args, kwargs = blocks[layer].inputs
            if layer == 0:
                hidden = args[0][:, : target["entering"]].clone()
                if -1 in writes:
                    parts.append(in_write(hidden, writes[-1], states.hidden, writing))
            if hidden.shape[1]:
                arguments = dict(zip(target["names"], args, strict=False)) | kwargs
                arguments = _in_narrowed(arguments, hidden, target["n_tokens"])
                if attending is None:
                    arguments["attention_mask"] = _in_mask(target, hidden, target["windows"][layer], masks)
                    output = blocks[layer](**arguments)
                else:
                    output = _in_attended(blocks[layer], arguments, attending, layer)
                hidden = output[0] if target["tuples"] else output
            hidden = _in_joined(hidden, target["bases"].get(layer))
            if layer in writes:
                parts.append(in_write(hidden, writes[layer], states.hidden, writing))
            after = hidden if layer + 1 == target["depth"] else args[0]
            blocks[layer].skip((after, None) if target["tuples"] else after)
        written = in_written(parts)
        if not readout["unembeds"]:
            columns = in_readout(model, readout, None, None, finals=states.finals, written=written)
            tracer.stop()
        else:
            logits = model.output.logits[0]
            if "logits_to_keep" not in target["options"]:
                logits = logits[in_sent(target["read"], logits.device)]
            forward, kept = _in_rows(model, cache, target, prefix)
            read = {"finals": states.finals, "written": written, "plain": model, "hear": hear}
            columns = in_readout(forward, readout, logits, kept, **read)
    return in_pending(columns, target, written)


def _in_fork(prefix: Any) -> Any:
    """Return a cache that continues another and leaves it unchanged, without copying what they share."""
    fork = copy.copy(prefix)
    fork.layers = [copy.copy(layer) for layer in prefix.layers]
    return fork


def _in_separately(cache: Any, target: PackedProgram) -> Any:
    """Return a context in which tokens attend to the prefix and to their own tokens separately.

    Set its `layer` to the number of a block before calling it.
    """
    own: dict[Any, Any] = {}

    def attend(layer: int, queries: torch.Tensor, scale: float | None) -> torch.Tensor:
        kept, device = cache.layers[layer], queries.device
        if device not in own:
            own[device] = in_own_tokens(target, device)
        return in_packed_attention(
            queries, kept.keys, kept.values, target["prefix"], own[device], scale=scale
        )

    return in_attending(attend)


def _in_narrowed(given: dict[str, Any], hidden: torch.Tensor, total: int) -> dict[str, Any]:
    """Restrict the arguments of a block to the tokens that run, which are the first ones of the sequence."""
    narrowed = {name: _in_narrow(value, hidden.shape[1], total) for name, value in given.items()}
    return narrowed | {"hidden_states": hidden, "attention_mask": None}


def _in_attended(block: Any, given: dict[str, Any], attending: Any, layer: int) -> Any:
    """Call a block inside `attending`, and check that it has called its attention exactly once."""
    attending.layer, calls = layer, attending.calls
    with attending:
        output = block(**given)
    if attending.calls != calls + 1:
        raise RuntimeError(
            f"block {layer} does not call its attention as the first block does; run without shared attention"
        )
    return output


def _in_narrow(value: Any, count: int, total: int) -> Any:
    """Return the first `count` of `total` tokens of (1, n_tokens, ...) or (n_tokens,) tensors."""
    if isinstance(value, tuple):
        return tuple(_in_narrow(part, count, total) for part in value)
    if isinstance(value, torch.Tensor):
        if value.ndim > 1 and value.shape[1] == total:
            return value[:, :count]
        if value.ndim == 1 and value.shape[0] == total:
            return value[:count]
    return value


def _in_mask(
    target: PackedProgram, hidden: torch.Tensor, window: int | None, masks: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Return the additive attention mask of a block, (1, 1, n_running, n_prefix + n_running).

    `masks` keeps the last mask, for the next blocks with as many tokens and the same window.
    """
    count, prefix = hidden.shape[1], target["prefix"]
    if (count, window) not in masks:
        device = hidden.device
        parts = (target["starts"], target["trunks"], target["seen"])
        starts, trunks, seen = (in_sent(part[:count, None], device) for part in parts)
        token = torch.arange(count, device=device)
        allowed = (token >= starts) & (token <= token[:, None])
        allowed = allowed | ((token >= trunks) & (token < trunks + seen))
        allowed = torch.cat([allowed.new_ones(count, prefix), allowed], dim=1)
        if window is not None:
            keys = in_sent(target["key_positions"][: prefix + count], device)
            allowed = allowed & (keys[prefix:, None] - keys < window)
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=device)
        masks.clear()
        masks[count, window] = mask.masked_fill_(~allowed, torch.finfo(hidden.dtype).min)[None, None]
    return masks[count, window]


def _in_joined(hidden: torch.Tensor, bases: torch.Tensor | None) -> torch.Tensor:
    """Append the tokens that join after this block; each starts with the state of its unpatched token."""
    if bases is None:
        return hidden
    # If no token has run, all that join are about to be written.
    fresh = hidden.new_zeros(1, len(bases), hidden.shape[2])
    if hidden.shape[1]:
        fresh = hidden[:, in_sent(bases, hidden.device)]
    return torch.cat([hidden, fresh], dim=1)


def _in_rows(model: Any, cache: Any, target: PackedProgram, prefix: Any) -> tuple[Any, Any]:
    """Return M* as a function, and the keys and values to decode from: one row for each cell.

    In blocks that a cell's own tokens have not run through, they are those of the unpatched prompt.
    """
    rows = target["rows"]
    if rows is None:
        return model, None
    forward, whole = in_shared(model, prefix) if rows["first"] else (model, DynamicCache())
    for layer, kept in enumerate(cache.layers):
        ran = (rows["enters"] < layer)[:, None]
        places = torch.where(ran, rows["own"], rows["clean"])[:, rows["first"] :]
        places = in_sent(places, kept.keys.device)
        keys, values = kept.keys[0][:, places], kept.values[0][:, places]
        whole.update(keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous(), layer)
    return forward, whole
