"""Source and target prompts as rows of padded batches, inside a context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import nnsight
import torch

from patchscope_nn.body.program import Work
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


def in_source(model: Any, one: Work, paths: dict[str, str]) -> dict[int, torch.Tensor]:
    """Read a batch of source prompts; the forward stops where nothing more is asked of it."""
    states: dict[int, torch.Tensor] = {}
    with model.trace(**one["inputs"], **one["options"]) as tracer:
        for layer, reads in one["reads"]:
            states.update(in_read(in_site(model, paths, layer, one), reads))
        if one["finals"] or one["whole"]:
            states.update(in_finals(model.output.logits, one["finals"]))
        else:
            tracer.stop()
    return states


def in_target(
    model: Any, one: Work, states: dict[int, torch.Tensor], paths: dict[str, str], how: Work
) -> list[dict[str, Any]]:
    """Read a batch of target prompts with the states written into it, and read out what it says."""
    with model.trace(**one["inputs"], **one["options"]) as tracer:
        written = in_patched(model, one, states, paths, how)
        if not one["readout"]["unembeds"]:
            rows = in_readout(model, one["readout"], None, None, states=states, written=written)
            tracer.stop()
        elif one["rereads"] or one["steps"]:
            logits = in_positions(model.output.logits, one["positions"]).clone()
            cache = model.output.get("past_key_values")
        else:
            logits = in_positions(model.output.logits, one["positions"])
            cache = model.output.get("past_key_values")
            rows = in_readout(model, one["readout"], logits, cache, states=states, written=written)
    if one["rereads"]:
        forward = in_rereading(model, one, states, paths, how)
        ids = one["inputs"]["input_ids"]
        rows = in_readout(
            forward, one["readout"], logits, ids, states=states, written=written, plain=in_plain(model)
        )
    elif one["steps"]:
        forward = in_stepping(model, one, states, paths, how)
        rows = in_readout(
            forward, one["readout"], logits, cache, states=states, written=written, plain=in_plain(model)
        )
    return in_explained(rows, one, states, written)


def in_patched(
    model: Any, one: Work, states: dict[int, torch.Tensor], paths: dict[str, str], how: Work
) -> dict[int, Any]:
    """Do all that is done to T, block by block; give what was written, and over what, by cell."""
    written: dict[int, Any] = {}
    if one["embedded"]:
        in_embedded(in_site(model, paths, -1, one), one["embedded"], states)
    cuts, writes = dict(one["cuts"]), dict(one["writes"])
    for layer in sorted({*cuts, *writes}):
        if layer in cuts:
            in_cut(in_blocks(model, paths)[layer], cuts[layer], one, layer)
        if layer in writes:
            found = in_write(in_site(model, paths, layer, one), writes[layer], states, how)
            # Of a window the first write is told of.
            written.update({cell: part for cell, part in found.items() if cell not in written})
    return written


def in_plain(model: Any) -> Any:
    """A model without any patch, as a function, where no trace is open."""

    def forward(**given: Any) -> Any:
        with model.trace(**given):
            logits = model.output.logits.clone()
            cache = model.output.get("past_key_values")
        return SimpleNamespace(logits=logits, past_key_values=cache)

    return forward


def in_stepping(
    model: Any, one: Work, states: dict[int, torch.Tensor], paths: dict[str, str], how: Work
) -> Any:
    """A model that writes at every token it decodes, as a function; of several states it writes the last."""
    last = {number: state[-1:] for number, state in states.items()}

    def forward(input_ids: torch.Tensor, **given: Any) -> Any:
        places = list(range(input_ids.shape[1]))
        here = {**one, "inputs": {"input_ids": input_ids}}
        with model.trace(input_ids=input_ids, **given):
            for layer, writes in one["writes"]:
                stepped = [{**write, "positions": places} for write in writes]
                in_write(in_site(model, paths, layer, here), stepped, last, how)
            logits = model.output.logits.clone()
            cache = model.output.past_key_values
        return SimpleNamespace(logits=logits, past_key_values=cache)

    return forward


def in_rereading(
    model: Any, one: Work, states: dict[int, torch.Tensor], paths: dict[str, str], how: Work
) -> Any:
    """A model that keeps no keys and values, as a function that takes the ids read so far for these.

    It reads the prompt again, with the patch; the tokens behind it are not patched. Its logits begin with
    those after the last token that was read before.
    """

    def forward(input_ids: torch.Tensor, past_key_values: torch.Tensor, **given: Any) -> Any:
        ids = torch.cat([past_key_values.to(input_ids.device), input_ids], dim=1)
        mask = given["attention_mask"]
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in one["inputs"]:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        with model.trace(**inputs, **{name: False for name in one["options"] if name == "use_cache"}):
            in_patched(model, {**one, "inputs": inputs}, states, paths, how)
            logits = model.output.logits[:, -input_ids.shape[1] - 1 :].clone()
        return SimpleNamespace(logits=logits, past_key_values=ids)

    return forward


def in_positions(logits: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """The logits that are read, (batch, vocab); positions count from the end."""
    return logits[list(range(len(logits))), positions]


def fused(model: Any, work: Work, backend: Any) -> dict[str, Any]:
    """Source rows and target rows in one batch: at each block the source is read, then the target written."""
    source, target = work["sources"][0], work["targets"][0]
    site, site_written = work["source_paths"], work["target_paths"]
    reads, writes = dict(source["reads"]), dict(target["writes"])
    layers = sorted({*reads, *writes})
    states: dict[int, torch.Tensor] = {}
    written: dict[int, Any] = {}
    first = len(source["inputs"]["input_ids"])
    options = {name: max(value, source["options"].get(name, 0)) for name, value in target["options"].items()}
    rows: Any = None  # where the backend does not wait, this is what is given
    with model.trace(backend=backend, **options) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(**source["inputs"]):
            for layer in layers:
                if layer in reads:
                    states.update(in_read(in_site(model, site, layer, source), reads[layer]))
                meet()
        with tracer.invoke(**target["inputs"]):
            for layer in layers:
                meet()
                if layer in writes:
                    value = in_site(model, site_written, layer, target, first=first)
                    written.update(in_write(value, writes[layer], states, work["how"]))
        with tracer.invoke():
            states.update(in_finals(model.output.logits, source["finals"]))
            given = {"states": states, "written": written, "first": first}
            rows = nnsight.save(_in_fused_readout(model, model.output, target, given))
    return {"passes": [rows], "kept": {}, "prefix": None}


def _in_fused_readout(model: Any, output: Any, one: Work, given: Work) -> list[dict[str, Any]]:
    """Read out the target's rows, which stand behind the source's, from row `first` on."""
    first = given["first"]
    written, states = given["written"], given["states"]
    if not one["readout"]["unembeds"]:
        rows = in_readout(model, one["readout"], None, None, states=states, written=written)
        return in_explained(rows, one, states, written)
    logits, cache = output.logits[first:], output.get("past_key_values")
    if one["readout"]["decodes"]:
        cache.reorder_cache(torch.arange(first, first + len(logits), device=logits.device))
    rows = in_readout(
        model, one["readout"], in_positions(logits, one["positions"]), cache, states=states, written=written
    )
    return in_explained(rows, one, states, written)
