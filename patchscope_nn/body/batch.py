"""Runs source and target prompts as rows of padded batches, inside a context."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import nnsight
import torch

from patchscope_nn.body.program import RowsProgram, SitePath, SourceProgram, Writing
from patchscope_nn.body.states import (
    in_blocks,
    in_cut,
    in_embedded,
    in_explained,
    in_finals,
    in_read,
    in_readout,
    in_site,
    in_write,
)


def in_source(model: Any, source: SourceProgram, site: SitePath) -> dict[int, torch.Tensor]:
    """Run a batch of source prompts and read its states; the forward pass stops after the last of them."""
    states: dict[int, torch.Tensor] = {}
    shape = source["inputs"]["input_ids"].shape
    with model.trace(**source["inputs"], **source["options"]) as tracer:
        for layer, reads in source["reads"].items():
            states.update(in_read(in_site(model, site, layer, shape), reads))
        if source["finals"] or source["whole"]:
            states.update(in_finals(model.output.logits, source["finals"]))
        else:
            tracer.stop()
    return states


def in_target(
    model: Any,
    target: RowsProgram,
    states: dict[int, torch.Tensor],
    site: SitePath,
    writing: Writing,
    *,
    hear: Any,
) -> list[dict[str, Any]]:
    """Run a batch of target prompts with states written into them, and return the readouts of its cells."""
    readout, inputs = target["readout"], target["inputs"]
    with model.trace(**inputs, **target["options"]) as tracer:
        written = in_patched(model, target, states, site, writing, inputs=inputs)
        if not readout["unembeds"]:
            rows = in_readout(model, readout, None, None, states=states, written=written)
            tracer.stop()
        elif target["rereads"] or target["every_step"]:
            logits = in_positions(model.output.logits, target["positions"]).clone()
            cache = model.output.get("past_key_values")
        else:
            logits = in_positions(model.output.logits, target["positions"])
            cache = model.output.get("past_key_values")
            rows = in_readout(model, readout, logits, cache, states=states, written=written, hear=hear)
    if target["rereads"] or target["every_step"]:
        if target["rereads"]:
            cache = inputs["input_ids"]
            forward = in_rereading(model, target, states, site, writing)
        else:
            forward = in_stepping(model, target, states, site, writing)
        read = {"states": states, "written": written, "plain": in_plain(model), "hear": hear}
        rows = in_readout(forward, readout, logits, cache, **read)
    return in_explained(rows, target, states, written)


def in_patched(
    model: Any,
    target: RowsProgram,
    states: dict[int, torch.Tensor],
    site: SitePath,
    writing: Writing,
    *,
    inputs: dict[str, torch.Tensor],
) -> dict[int, Any]:
    """Apply embeddings, cuts and writes block by block; return {cell: [new state, previous state]}.

    `inputs` are the pass's own, or those of a later forward pass that reads its prompts again.
    """
    written: dict[int, Any] = {}
    shape = inputs["input_ids"].shape
    if target["embedded"]:
        in_embedded(in_site(model, site, -1, shape), target["embedded"], states)
    cuts, writes = target["cuts"], target["writes"]
    for layer in sorted({*cuts, *writes}):
        if layer in cuts:
            block = in_blocks(model, site)[layer]
            in_cut(block, cuts[layer], inputs["attention_mask"], target["names"], target["windows"][layer])
        if layer in writes:
            parts = in_write(in_site(model, site, layer, shape), writes[layer], states, writing)
            # If several layers are written, the first write is reported.
            written.update({cell: part for cell, part in parts.items() if cell not in written})
    return written


def in_plain(model: Any) -> Any:
    """Return the model without any patch, as a function to be called outside of a trace."""

    def forward(**kwargs: Any) -> Any:
        with model.trace(**kwargs):
            logits = model.output.logits.clone()
            cache = model.output.get("past_key_values")
        return SimpleNamespace(logits=logits, past_key_values=cache)

    return forward


def in_stepping(
    model: Any, target: RowsProgram, states: dict[int, torch.Tensor], site: SitePath, writing: Writing
) -> Any:
    """Return the model as a function that writes at every token it decodes: the last of several states."""
    last = {number: state[-1:] for number, state in states.items()}

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        columns = list(range(input_ids.shape[1]))
        with model.trace(input_ids=input_ids, **kwargs):
            for layer, writes in target["writes"].items():
                stepped: Any = [{**write, "positions": columns} for write in writes]
                in_write(in_site(model, site, layer, input_ids.shape), stepped, last, writing)
            logits = model.output.logits.clone()
            cache = model.output.past_key_values
        return SimpleNamespace(logits=logits, past_key_values=cache)

    return forward


def in_rereading(
    model: Any, target: RowsProgram, states: dict[int, torch.Tensor], site: SitePath, writing: Writing
) -> Any:
    """Return the model as a function without a cache: `past_key_values` are the ids that it has read so far.

    It reads the prompt again, with the patch; the tokens after the prompt are not patched. Its logits begin
    with those after the last token that it had read before.
    """

    def forward(input_ids: torch.Tensor, past_key_values: torch.Tensor, **kwargs: Any) -> Any:
        ids = torch.cat([past_key_values.to(input_ids.device), input_ids], dim=1)
        mask = kwargs["attention_mask"]
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in target["inputs"]:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        with model.trace(**inputs, **{name: False for name in target["options"] if name == "use_cache"}):
            in_patched(model, target, states, site, writing, inputs=inputs)
            logits = model.output.logits[:, -input_ids.shape[1] - 1 :].clone()
        return SimpleNamespace(logits=logits, past_key_values=ids)

    return forward


def in_positions(logits: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Return the logits that are read, (batch, vocab); positions count from the end."""
    return logits[list(range(len(logits))), positions]


def fused(model: Any, program: Any, backend: Any, hear: Sequence[Any]) -> dict[str, Any]:
    """Run source and target rows as one batch: in each block, sources are read, then targets written."""
    source, target, hear_pass = program["sources"][0], program["targets"][0], hear[0] if hear else None
    reads, writes = source["reads"], target["writes"]
    layers = sorted({*reads, *writes})
    states: dict[int, torch.Tensor] = {}
    written: dict[int, Any] = {}
    shape, shape_written = source["inputs"]["input_ids"].shape, target["inputs"]["input_ids"].shape
    first = shape[0]
    options = {name: max(value, source["options"].get(name, 0)) for name, value in target["options"].items()}
    rows: Any = None  # returned if the backend does not wait
    with model.trace(backend=backend, **options) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(**source["inputs"]):
            for layer in layers:
                if layer in reads:
                    value = in_site(model, program["source_site"], layer, shape)
                    states.update(in_read(value, reads[layer]))
                meet()
        with tracer.invoke(**target["inputs"]):
            for layer in layers:
                meet()
                if layer in writes:
                    value = in_site(model, program["target_site"], layer, shape_written, first=first)
                    written.update(in_write(value, writes[layer], states, program["writing"]))
        with tracer.invoke():
            states.update(in_finals(model.output.logits, source["finals"]))
            rows = nnsight.save(
                _in_fused_readout(model, model.output, target, states, written, first=first, hear=hear_pass)
            )
    return {"passes": [rows], "kept": {}, "prefix": None}


def _in_fused_readout(
    model: Any,
    output: Any,
    target: RowsProgram,
    states: dict[int, torch.Tensor],
    written: dict[int, Any],
    *,
    first: int,
    hear: Any,
) -> list[dict[str, Any]]:
    """Read out the target's rows, which follow the source's, from row `first` on."""
    readout = target["readout"]
    if not readout["unembeds"]:
        rows = in_readout(model, readout, None, None, states=states, written=written)
        return in_explained(rows, target, states, written)
    logits, cache = output.logits[first:], output.get("past_key_values")
    if readout["decodes"]:
        cache.reorder_cache(torch.arange(first, first + len(logits), device=logits.device))
    logits = in_positions(logits, target["positions"])
    rows = in_readout(model, readout, logits, cache, states=states, written=written, hear=hear)
    return in_explained(rows, target, states, written)
