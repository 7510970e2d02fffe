"""Plan -> nnsight contexts. The only file that opens a trace.

    fused    one trace; source and target are two invokes that meet at a barrier, and so one forward
    session  one session: source traces, then target traces that use their values
    nested   two models: the source's traces run inside the target's session
    bridged  two models, not both in this process: the source's session gives its states back, and they
             travel as values inside the target's

Functions named `_in_...` run inside a context, on whatever machine that is. They take what `unpack` made
(ints, strings, lists, tensors) and use torch, nnsight and functions of this package that take the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import nnsight
import torch

from patchscope_nn.mappings import apply_mapping
from patchscope_nn.plan import Context
from patchscope_nn.readouts import read_choices, read_generate, read_next_token
from patchscope_nn.unpack import Work

#: What a context gives back: the readouts of each target pass, row by row, and the states that go out.
Results = dict[str, Any]


def emit(
    context: Context, work: Work, *, source: Any, target: Any, remote: Literal[False, "local"] = False
) -> Results:
    """Open a context and run a step in it.

    Args:
        context: Which one.
        work: What `unpack` made of the step.
        source: M, an nnsight model.
        target: M*, an nnsight model; the same object where there is one model.
        remote: `local` takes the step through nnsight's own serialisation, in this process.

    Returns:
        `passes`: for each target pass a list of readouts, one for each row; `kept`: tensors by number.
    """
    # A body is shipped by the source of its functions; without this they would be looked up by name.
    nnsight.register("patchscope_nn")
    with torch.no_grad(), _untracked(source, target):
        if context == "fused":
            return _fused(target, work, remote)
        if context == "session":
            return _session(target, work, remote)
        if context == "bridged":
            return _bridged(source, target, work, remote)
        return _nested(source, target, work)


@contextmanager
def _untracked(*models: Any) -> Iterator[None]:
    """Leave the models' training mode as it was; a Patchscope never runs with dropout."""
    training = [module for module in (model._module for model in models) if module.training]  # noqa: SLF001 (as in Model.module)
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def _session(model: Any, work: Work, remote: Literal[False, "local"]) -> Results:
    with model.session(remote=remote):
        results = nnsight.save(_in_session(model, model, work))
    return results  # noqa: RET504 (a context's body binds a name; it cannot return)


def _nested(source: Any, target: Any, work: Work) -> Results:
    with target.session():
        results = nnsight.save(_in_session(source, target, work))
    return results  # noqa: RET504 (the same)


def _bridged(source: Any, target: Any, work: Work, remote: Literal[False, "local"]) -> Results:
    read = {**work, "targets": [], "carried": {}, "keep": work["fresh"]}
    with source.session(remote=remote):
        bridge = nnsight.save(_in_session(source, source, read))
    written = {**work, "sources": [], "carried": {**work["carried"], **bridge["kept"]}}
    return _session(target, written, remote)


def _in_session(source: Any, target: Any, work: Work) -> Results:
    states = dict(work["carried"])
    for one in work["sources"]:
        states.update(_in_source(source, one, work["source_paths"]))
    passes = [
        _in_target(target, one, states, work["target_paths"], work["mapping"]) for one in work["targets"]
    ]
    return {"passes": passes, "kept": {number: states[number].clone() for number in work["keep"]}}


def _in_source(model: Any, one: Work, paths: dict[str, str]) -> dict[int, torch.Tensor]:
    """Read a batch of source prompts; the forward stops where nothing more is asked of it."""
    states: dict[int, torch.Tensor] = {}
    with model.trace(**one["inputs"], **one["options"]) as tracer:
        for layer, reads in one["reads"]:
            states.update(_in_read(_in_site(model, paths, layer, one), reads))
        if one["finals"]:
            states.update(_in_finals(model.output.logits, one["finals"]))
        else:
            tracer.stop()
    return states


def _in_target(
    model: Any, one: Work, states: dict[int, torch.Tensor], paths: dict[str, str], mapping: list[Any]
) -> list[dict[str, Any]]:
    """Read a batch of target prompts with the states written into it, and read out what it says."""
    written: dict[int, Any] = {}
    with model.trace(**one["inputs"], **one["options"]) as tracer:
        for layer, writes in one["writes"]:
            written.update(_in_write(_in_site(model, paths, layer, one), writes, states, mapping))
        if one["readout"]["name"] == "hidden":
            rows = _in_hidden(one, written)
            tracer.stop()
        else:
            rows = _in_readout(model, model.output, one, states)
    return rows


def _fused(model: Any, work: Work, remote: Literal[False, "local"]) -> Results:
    """Source rows and target rows in one batch: at each block the source is read, then the target written."""
    source, target = work["sources"][0], work["targets"][0]
    site, site_written, mapping = work["source_paths"], work["target_paths"], work["mapping"]
    reads, writes = dict(source["reads"]), dict(target["writes"])
    layers = sorted({*reads, *writes})
    states: dict[int, torch.Tensor] = {}
    written: dict[int, Any] = {}
    first = len(source["inputs"]["input_ids"])
    options = {name: max(value, source["options"][name]) for name, value in target["options"].items()}
    with model.trace(remote=remote, **options) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(**source["inputs"]):
            for layer in layers:
                if layer in reads:
                    states.update(_in_read(_in_site(model, site, layer, source), reads[layer]))
                meet()
        with tracer.invoke(**target["inputs"]):
            for layer in layers:
                meet()
                if layer in writes:
                    value = _in_site(model, site_written, layer, target, first=first)
                    written.update(_in_write(value, writes[layer], states, mapping))
        with tracer.invoke():
            states.update(_in_finals(model.output.logits, source["finals"]))
            given = {"states": states, "written": written, "first": first}
            rows = nnsight.save(_in_fused_readout(model, model.output, target, given))
    return {"passes": [rows], "kept": {}}


def _in_fused_readout(model: Any, output: Any, one: Work, given: Work) -> list[dict[str, Any]]:
    """Read out the target's rows, which stand behind the source's, from row `first` on."""
    first = given["first"]
    if one["readout"]["name"] == "hidden":
        return _in_hidden(one, given["written"])
    output.logits = output.logits[first:]
    if one["readout"]["caches"]:
        rows = torch.arange(first, first + len(output.logits), device=output.logits.device)
        output.past_key_values.batch_select_indices(rows)
    return _in_readout(model, output, one, given["states"])


def _in_site(model: Any, paths: dict[str, str], layer: int, one: Work, *, first: int = 0) -> Any:
    """The tensor at a layer, (batch, n_tokens, d_model). Modules give it, or a tuple that starts with it.

    OPT's MLP gives it flat, (batch * n_tokens, d_model); and of a flat tensor nnsight does not know which rows
    are this invoke's, so that in a fused trace those from `first` on are taken here.
    """
    part = model
    for name in paths["blocks"].split("."):
        part = getattr(part, name)
    if layer < 0:
        return part[0].input
    part = part[layer]
    for name in paths["part"].split(".") if paths["part"] else ():
        part = getattr(part, name)
    value = part.output
    value = value[0] if isinstance(value, tuple) else value
    if value.ndim > 2:  # noqa: PLR2004 (the flat one has two dimensions)
        return value
    batch, width = one["inputs"]["input_ids"].shape
    value = value.view(-1, width, value.shape[-1])
    return value if len(value) == batch else value[first : first + batch]


def _in_read(value: torch.Tensor, reads: list[Any]) -> dict[int, torch.Tensor]:
    """States by number, each (n_positions, d_model)."""
    rows = [row for _, row, positions in reads for _ in positions]
    gathered = value[rows, [at for _, _, positions in reads for at in positions]]
    parts = gathered.split([len(positions) for _, _, positions in reads])
    return {number: part for (number, _, _), part in zip(reads, parts, strict=True)}


def _in_finals(logits: torch.Tensor, finals: list[Any]) -> dict[int, torch.Tensor]:
    """Unpatched next-token log-probabilities by number, each (vocab,)."""
    return {
        number: torch.log_softmax(logits[row, position].float(), dim=-1) for number, row, position in finals
    }


def _in_write(
    value: torch.Tensor, writes: list[Any], states: dict[int, torch.Tensor], mapping: list[Any]
) -> dict[int, list[list[float]]]:
    """Write the mapped states of one layer, all rows at once; give what was written, by row."""
    rows = [row for _, row, positions, _ in writes for _ in positions]
    places = [at for _, _, positions, _ in writes for at in positions]
    incoming = torch.cat([states[number].to(value.device) for number, *_ in writes])
    mapped = apply_mapping(mapping[0], mapping[1], incoming, value[rows, places])
    parts = list(mapped.split([len(positions) for _, _, positions, _ in writes]))
    for place, (_, _, _, seed) in enumerate(writes):
        if seed is not None:
            parts[place] = _in_random(parts[place], seed)
    value[rows, places] = torch.cat(parts)
    return {row: part for (_, row, _, _), part in zip(writes, parts, strict=True)}


def _in_random(states: torch.Tensor, seed: int) -> torch.Tensor:
    """States of random direction, each with the norm of the one it stands for."""
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed)).to(states)
    return noise * (states.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def _in_hidden(one: Work, written: dict[int, torch.Tensor]) -> list[dict[str, Any]]:
    """What was written into each row; an unpatched row has none."""
    rows = range(len(one["inputs"]["input_ids"]))
    return [{"hidden": written[row].float().tolist() if row in written else None} for row in rows]


def _in_readout(model: Any, output: Any, one: Work, states: dict[int, torch.Tensor]) -> list[dict[str, Any]]:
    """Call the readout a pass asks for. The prompt has been read: nothing from here on is patched."""
    readout, logits = one["readout"], output.logits
    mask = one["inputs"]["attention_mask"].to(logits.device)
    numbered = "position_ids" in one["inputs"]
    at_positions = logits[list(range(len(logits))), readout["positions"]]
    if readout["name"] == "next_token":
        return read_next_token(
            at_positions,
            top_k=readout["top_k"],
            references=readout["references"],
            source_logprobs=[None if number is None else states[number] for number in readout["before"]],
            from_source=readout["from_source"],
        )
    if readout["name"] == "choices":
        return read_choices(
            model,
            at_positions,
            output.past_key_values,
            mask,
            numbered=numbered,
            continuations=readout["continuations"],
        )
    last = {"logits_to_keep": 1} if "logits_to_keep" in one["options"] else {}
    return read_generate(
        model,
        at_positions,
        output.past_key_values,
        mask,
        extra=last,
        numbered=numbered,
        max_new_tokens=readout["max_new_tokens"],
        eos=readout["eos"],
        stops=readout["stops"],
        temperature=readout["temperature"],
        seeds=readout["seeds"],
    )
