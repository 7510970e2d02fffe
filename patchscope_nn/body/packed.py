"""Target prompts as segments of one sequence, inside a context.

The model's own forward is a shell here: it embeds the tokens, gives every block what that block is called
with, and ends in its own norm and unembedding. Between, each block is called with the tokens that have
joined by then (see `plan/layout.py`), and the shell skips it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from patchscope_nn.body.attention import in_attending
from patchscope_nn.body.program import CellRows, PackedProgram, PrefixProgram, SitePath, Writing
from patchscope_nn.body.states import in_blocks, in_explained, in_readout, in_write


def in_prefix(model: Any, prefix: PrefixProgram, site: SitePath) -> Any:
    """Run the tokens that all target prompts of a step begin with; return their keys and values."""
    if prefix["known"] is not None:
        return prefix["known"]
    # A cache without a config keeps every token of every block, whatever its window: masks see to that.
    cache = DynamicCache()
    with model.trace(**prefix["inputs"], **prefix["options"], past_key_values=cache) as tracer:
        in_blocks(model, site)[-1].output  # noqa: B018 (waiting for it is the point: then all have run)
        tracer.stop()
    return cache


def in_packed(
    model: Any,
    target: PackedProgram,
    states: dict[int, torch.Tensor],
    site: SitePath,
    writing: Writing,
    *,
    prefix: Any,
    hear: Any,
) -> list[dict[str, Any]]:
    """Run a pass's segments with the states written into them, and read them out."""
    writes, readout = target["writes"], target["readout"]
    written: dict[int, Any] = {}
    masks: dict[Any, torch.Tensor] = {}
    cache = DynamicCache() if prefix is None else _in_fork(prefix)
    attending = None
    if target["own"] is not None:
        attending = in_attending(cache, target["prefix"], target["own"])
    with model.trace(**target["inputs"], **target["options"], past_key_values=cache) as tracer:
        blocks = in_blocks(model, site)
        for layer in range(target["depth"]):
            args, kwargs = blocks[layer].inputs
            if layer == 0:
                hidden = args[0][:, : target["entering"]].clone()
                if -1 in writes:
                    written.update(in_write(hidden, writes[-1], states, writing))
            if hidden.shape[1]:
                given = dict(zip(target["names"], args, strict=False)) | kwargs
                given = _in_narrowed(given, hidden, target["n_tokens"])
                if attending is None or hidden.device.type != "cpu":
                    given["attention_mask"] = _in_mask(target, hidden, target["windows"][layer], masks)
                    output = blocks[layer](**given)
                else:
                    output = _in_attended(blocks[layer], given, attending, layer)
                hidden = output[0] if target["tuples"] else output
            hidden = _in_joined(hidden, target["bases"].get(layer))
            if layer in writes:
                parts = in_write(hidden, writes[layer], states, writing)
                # If several layers are written, the first write is reported.
                written.update({cell: part for cell, part in parts.items() if cell not in written})
            after = hidden if layer + 1 == target["depth"] else args[0]
            blocks[layer].skip((after, None) if target["tuples"] else after)
        if not readout["unembeds"]:
            rows = in_readout(model, readout, None, None, states=states, written=written)
            tracer.stop()
        else:
            logits = model.output.logits[0]
            if "logits_to_keep" not in target["options"]:
                logits = logits[target["read"]]
            kept = _in_rows(cache, target["rows"]) if target["rows"] is not None else None
            rows = in_readout(model, readout, logits, kept, states=states, written=written, hear=hear)
    return in_explained(rows, target, states, written)


def _in_fork(prefix: Any) -> Any:
    """A cache that goes on from another and leaves it as it is; what they share is not copied."""
    fork = copy.copy(prefix)
    fork.layers = [copy.copy(layer) for layer in prefix.layers]
    return fork


def _in_narrowed(given: dict[str, Any], hidden: torch.Tensor, total: int) -> dict[str, Any]:
    """What a block is called with, for the tokens that run: the first so many of the sequence."""
    narrowed = {name: _in_narrow(value, hidden.shape[1], total) for name, value in given.items()}
    return narrowed | {"hidden_states": hidden, "attention_mask": None}


def _in_attended(block: Any, given: dict[str, Any], attending: Any, layer: int) -> Any:
    """Call a block that attends as `attending` does."""
    attending.layer, calls = layer, attending.calls
    with attending:
        output = block(**given)
    if attending.calls != calls + 1:
        raise RuntimeError(
            f"block {layer} does not attend as the first one does; run without shared attention"
        )
    return output


def _in_narrow(value: Any, count: int, total: int) -> Any:
    """The first `count` of the sequence's `total` tokens, in (1, n_tokens, ...) or (n_tokens,) tensors."""
    if isinstance(value, tuple):
        return tuple(_in_narrow(one, count, total) for one in value)
    if isinstance(value, torch.Tensor):
        if value.ndim > 1 and value.shape[1] == total:
            return value[:, :count]
        if value.ndim == 1 and value.shape[0] == total:
            return value[:count]
    return value


def _in_mask(
    target: PackedProgram, hidden: torch.Tensor, window: int | None, masks: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Which token attends to which, as a mask to be added: (1, 1, n_running, n_prefix + n_running).

    `masks` keeps the last one: it serves every block with as many tokens and the same window.
    """
    count, keys = hidden.shape[1], target["key_positions"]
    if (count, window) not in masks:
        seen = target["prefix"] + count
        everything = masks["allowed"] if "allowed" in masks else _in_allowed(target)
        allowed = everything[:count, :seen]
        if window is not None:
            positions = keys[target["prefix"] :][:count]
            allowed = allowed & (positions[:, None] - keys[None, :seen] < window)
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        mask.masked_fill_(~allowed.to(hidden.device), torch.finfo(hidden.dtype).min)
        masks.clear()
        masks["allowed"] = everything
        masks[count, window] = mask[None, None]
    return masks[count, window]


def _in_allowed(target: PackedProgram) -> torch.Tensor:
    """(n_tokens, n_prefix + n_tokens): whether a token attends to another."""
    if target["allowed"] is not None:
        return target["allowed"]
    prefix = target["prefix"]
    own: Any = target["own"]
    places, real = own["places"], own["real"]
    allowed = torch.zeros(len(places), prefix + len(places), dtype=torch.bool)
    allowed[:, :prefix] = True
    rows, columns = real.nonzero(as_tuple=True)
    allowed[rows, prefix + places[rows, columns]] = True
    return allowed


def _in_joined(hidden: torch.Tensor, bases: list[int | None] | None) -> torch.Tensor:
    """The tokens that run, and behind them those that join here, each starting from its unpatched token.

    A token without a base is about to be written, and starts from zeros.
    """
    if not bases:
        return hidden
    fresh = hidden.new_zeros(1, len(bases), hidden.shape[2])
    known = [place for place, base in enumerate(bases) if base is not None]
    if known:
        fresh[:, known] = hidden[:, [bases[place] for place in known]]
    return torch.cat([hidden, fresh], dim=1)


def _in_rows(cache: Any, rows: CellRows) -> Any:
    """The keys and values of each cell's whole prompt, a row for each: decoding goes on from them.

    In the blocks that a cell's own tokens did not run through they are the clean prompt's.
    """
    whole = DynamicCache()
    for layer, kept in enumerate(cache.layers):
        ran = (rows["enters"] < layer)[:, None]
        places = torch.where(ran, rows["own"], rows["clean"]).to(kept.keys.device)
        keys, values = kept.keys[0][:, places], kept.values[0][:, places]
        whole.update(keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous(), layer)
    return whole
