"""Source and target prompts as rows of padded batches, inside a context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import nnsight
import torch

from patchscope_nn.emit.states import in_finals, in_hidden, in_read, in_readout, in_site, in_write
from patchscope_nn.unpack import Work


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
    model: Any, one: Work, states: dict[int, torch.Tensor], paths: dict[str, str], mapping: list[Any]
) -> list[dict[str, Any]]:
    """Read a batch of target prompts with the states written into it, and read out what it says."""
    written: dict[int, Any] = {}
    with model.trace(**one["inputs"], **one["options"]) as tracer:
        for layer, writes in one["writes"]:
            written.update(in_write(in_site(model, paths, layer, one), writes, states, mapping))
        if one["readout"]["name"] == "hidden":
            rows = in_hidden(one["cells"], written)
            tracer.stop()
        elif one["rereads"]:
            logits = in_positions(model.output.logits, one["positions"]).clone()
        else:
            logits = in_positions(model.output.logits, one["positions"])
            rows = in_readout(model, one["readout"], logits, model.output.get("past_key_values"), states)
    if one["rereads"]:
        forward = in_rereading(model, one, states, paths, mapping)
        rows = in_readout(forward, one["readout"], logits, one["inputs"]["input_ids"], states)
    return rows


def in_rereading(
    model: Any, one: Work, states: dict[int, torch.Tensor], paths: dict[str, str], mapping: list[Any]
) -> Any:
    """A model that keeps no keys and values, as a function that takes the ids read so far for these.

    It reads the prompt again, with the patch: the tokens behind it are not patched, as ever.
    """

    def forward(input_ids: torch.Tensor, past_key_values: torch.Tensor, **given: Any) -> Any:
        ids = torch.cat([past_key_values.to(input_ids.device), input_ids], dim=1)
        with model.trace(input_ids=ids, attention_mask=given["attention_mask"]):
            for layer, writes in one["writes"]:
                in_write(in_site(model, paths, layer, one), writes, states, mapping)
            logits = model.output.logits[:, -input_ids.shape[1] :].clone()
        return SimpleNamespace(logits=logits, past_key_values=ids)

    return forward


def in_positions(logits: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """The logits that are read, (batch, vocab); positions count from the end."""
    return logits[list(range(len(logits))), positions]


def fused(model: Any, work: Work, backend: Any) -> dict[str, Any]:
    """Source rows and target rows in one batch: at each block the source is read, then the target written."""
    source, target = work["sources"][0], work["targets"][0]
    site, site_written, mapping = work["source_paths"], work["target_paths"], work["mapping"]
    reads, writes = dict(source["reads"]), dict(target["writes"])
    layers = sorted({*reads, *writes})
    states: dict[int, torch.Tensor] = {}
    written: dict[int, Any] = {}
    first = len(source["inputs"]["input_ids"])
    options = {name: max(value, source["options"][name]) for name, value in target["options"].items()}
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
                    written.update(in_write(value, writes[layer], states, mapping))
        with tracer.invoke():
            states.update(in_finals(model.output.logits, source["finals"]))
            given = {"states": states, "written": written, "first": first}
            rows = nnsight.save(_in_fused_readout(model, model.output, target, given))
    return {"passes": [rows], "kept": {}, "prefix": None}


def _in_fused_readout(model: Any, output: Any, one: Work, given: Work) -> list[dict[str, Any]]:
    """Read out the target's rows, which stand behind the source's, from row `first` on."""
    first = given["first"]
    if one["readout"]["name"] == "hidden":
        return in_hidden(one["cells"], given["written"])
    logits, cache = output.logits[first:], output.get("past_key_values")
    if one["readout"]["name"] != "next_token":
        cache.batch_select_indices(torch.arange(first, first + len(logits), device=logits.device))
    return in_readout(model, one["readout"], in_positions(logits, one["positions"]), cache, given["states"])
