"""Runs source and target prompts as rows of padded batches, inside a context."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import nnsight
import torch

from patchscope_nn.body.devices import in_sent
from patchscope_nn.body.program import RowsProgram, SitePath, SourceProgram, Write, Writing
from patchscope_nn.body.states import (
    in_blocks,
    in_cut,
    in_embedded,
    in_explained,
    in_finals,
    in_read,
    in_readout,
    in_site,
    in_together,
    in_write,
    in_written,
)


def in_source(
    model: Any, source: SourceProgram, site: SitePath
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a batch of source prompts, and return its states and its distributions, each as a list of tensors.

    The forward pass stops after the last state.
    """
    states: list[torch.Tensor] = []
    finals: list[torch.Tensor] = []
    shape = source["inputs"]["input_ids"].shape
    with model.trace(**source["inputs"], **source["options"]) as tracer:
        for layer, places in source["reads"].items():
            states.append(in_read(in_site(model, site, layer, shape), places))
        if source["finals"] is not None or source["whole"]:
            finals.extend(in_finals(model.output.logits, source["finals"]))
        else:
            tracer.stop()
    return states, finals


def in_target(
    model: Any, target: RowsProgram, states: Any, site: SitePath, writing: Writing, *, hear: Any
) -> dict[str, Any]:
    """Run a batch of target prompts with states written into them, and return the readouts of its cells."""
    readout, inputs = target["readout"], target["inputs"]
    later = target["rereads"] or target["every_step"]
    with model.trace(**inputs, **target["options"]) as tracer:
        written = in_patched(model, target, states, site, writing, inputs=inputs)
        if not readout["unembeds"]:
            columns = in_readout(model, readout, None, None, finals=states.finals, written=written)
            tracer.stop()
        else:
            logits = in_positions(model.output.logits, target["positions"])
            cache = model.output.get("past_key_values")
            if later:
                logits = logits.clone()
            else:
                read = {"finals": states.finals, "written": written, "hear": hear}
                columns = in_readout(model, readout, logits, cache, **read)
    if later:
        if target["rereads"]:
            cache = inputs["input_ids"]
            forward = in_rereading(model, target, states, site, writing)
        else:
            forward = in_stepping(model, target, states, site, writing)
        read = {"finals": states.finals, "written": written, "plain": in_plain(model), "hear": hear}
        columns = in_readout(forward, readout, logits, cache, **read)
    return in_explained(columns, target, states.hidden, written)


def in_patched(
    model: Any,
    target: RowsProgram,
    states: Any,
    site: SitePath,
    writing: Writing,
    *,
    inputs: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Apply embeddings, cuts and writes block by block; return what was written, as in `PatchedRun`.

    `inputs` are the pass's own, or those of a later forward pass that reads its prompts again.
    """
    parts = []
    shape = inputs["input_ids"].shape
    if target["embedded"]:
        in_embedded(in_site(model, site, -1, shape), target["embedded"], states.soft)
    cuts, writes = target["cuts"], target["writes"]
    for layer in sorted({*cuts, *writes}):
        if layer in cuts:
            block = in_blocks(model, site)[layer]
            in_cut(block, cuts[layer], inputs["attention_mask"], target["names"], target["windows"][layer])
        if layer in writes:
            parts.append(in_write(in_site(model, site, layer, shape), writes[layer], states.hidden, writing))
    return in_written(parts)


def in_plain(model: Any) -> Any:
    """Return the model without any patch, as a function to be called outside of a trace."""

    def forward(**kwargs: Any) -> Any:
        with model.trace(**kwargs):
            logits = model.output.logits.clone()
            cache = model.output.get("past_key_values")
        return SimpleNamespace(logits=logits, past_key_values=cache)

    return forward


def in_stepping(model: Any, target: RowsProgram, states: Any, site: SitePath, writing: Writing) -> Any:
    """Return the model as a function that writes at every token it decodes: the last of several states."""

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        with model.trace(input_ids=input_ids, **kwargs):
            for layer, write in target["writes"].items():
                stepped = in_last(write, input_ids.shape[1])
                in_write(in_site(model, site, layer, input_ids.shape), stepped, states.hidden, writing)
            logits = model.output.logits.clone()
            cache = model.output.past_key_values
        return SimpleNamespace(logits=logits, past_key_values=cache)

    return forward


def in_last(write: Write, count: int) -> Any:
    """Return the write of the last state of each cell at the positions 0 to `count` - 1 of its row."""
    cells = write["cells"]
    last = torch.ones_like(cells, dtype=torch.bool)
    last[:-1] = cells[1:] != cells[:-1]
    index = last.nonzero()[:, 0].repeat_interleave(count)
    stepped: Any = {name: part[index] for name, part in write.items() if isinstance(part, torch.Tensor)}
    random: Any = write["random"]
    if random is not None:
        stepped["random"] = {name: part[index] for name, part in random.items()}
    return {**write, **stepped, "positions": torch.arange(count).repeat(len(index) // count)}


def in_rereading(model: Any, target: RowsProgram, states: Any, site: SitePath, writing: Writing) -> Any:
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


def in_positions(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the logits that are read, (batch, vocab); positions count from the end."""
    return logits[torch.arange(len(logits), device=logits.device), in_sent(positions, logits.device)]


def fused(model: Any, program: Any, backend: Any, hear: Sequence[Any]) -> dict[str, Any]:
    """Run source and target rows as one batch: in each block, sources are read, then targets written."""
    source, target, hear_pass = program["sources"][0], program["targets"][0], hear[0] if hear else None
    reads, writes = source["reads"], target["writes"]
    layers = sorted({*reads, *writes})
    states = SimpleNamespace(hidden=None, finals=None)
    parts: list[dict[str, torch.Tensor]] = []
    shape, shape_written = source["inputs"]["input_ids"].shape, target["inputs"]["input_ids"].shape
    first = shape[0]
    options = {name: max(value, source["options"].get(name, 0)) for name, value in target["options"].items()}
    columns: Any = None  # returned if the backend does not wait
    with model.trace(backend=backend, **options) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(**source["inputs"]):
            for layer in layers:
                if layer in reads:
                    read = in_read(in_site(model, program["source_site"], layer, shape), reads[layer])
                    states.hidden = read if states.hidden is None else in_together([states.hidden, read])
                meet()
        with tracer.invoke(**target["inputs"]):
            for layer in layers:
                meet()
                if layer in writes:
                    value = in_site(model, program["target_site"], layer, shape_written, first=first)
                    parts.append(in_write(value, writes[layer], states.hidden, program["writing"]))
        with tracer.invoke():
            states.finals = in_together(in_finals(model.output.logits, source["finals"]))
            columns = nnsight.save(
                _in_fused_readout(
                    model, model.output, target, states, in_written(parts), first=first, hear=hear_pass
                )
            )
    return {"passes": [columns], "kept": None, "kept_finals": None, "prefix": None}


def _in_fused_readout(
    model: Any,
    output: Any,
    target: RowsProgram,
    states: Any,
    written: dict[str, torch.Tensor],
    *,
    first: int,
    hear: Any,
) -> dict[str, Any]:
    """Read out the target's rows, which follow the source's, from row `first` on."""
    readout, read = target["readout"], {"finals": states.finals, "written": written, "hear": hear}
    if not readout["unembeds"]:
        columns = in_readout(model, readout, None, None, finals=states.finals, written=written)
        return in_explained(columns, target, states.hidden, written)
    logits, cache = output.logits[first:], output.get("past_key_values")
    if readout["decodes"]:
        cache.reorder_cache(torch.arange(first, first + len(logits), device=logits.device))
    columns = in_readout(model, readout, in_positions(logits, target["positions"]), cache, **read)
    return in_explained(columns, target, states.hidden, written)
