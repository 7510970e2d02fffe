"""Reads and writes hidden states, inside a context.

Functions named `in_...` run inside a context, perhaps on a server. They take parts of a program (see
`program.py`), and use only torch, nnsight and other functions of `body`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from patchscope_nn.body.devices import in_sent
from patchscope_nn.body.mappings import apply_mapping
from patchscope_nn.body.program import (
    Cut,
    Embedded,
    Places,
    ReadoutProgram,
    SitePath,
    Sums,
    TargetProgram,
    Write,
    Writing,
)
from patchscope_nn.body.random import in_normal


def in_blocks(model: Any, site: SitePath) -> Any:
    """Return the list of decoder blocks."""
    part = model
    for name in site["blocks"].split("."):
        part = getattr(part, name)
    return part


def in_site(model: Any, site: SitePath, layer: int, shape: Any, *, first: int = 0) -> Any:
    """Return the states at a site of a layer, (batch, n_tokens, d_model), as a view that can be written to.

    A module returns them alone, or first in a tuple or list. OPT's MLP returns them flat, (batch * n_tokens,
    d_model). nnsight cannot tell which rows of a flat tensor belong to an invoke, so in a fused trace the
    rows from `first` on are taken here.

    Args:
        model: The model.
        site: The site in a block.
        layer: The block; -1 is the input of block 0.
        shape: (batch, n_tokens) of the pass.
        first: The first row of this invoke in the batch.
    """
    blocks = in_blocks(model, site)
    if layer < 0:
        return blocks[0].input
    part = blocks[layer]
    for name in site["part"].split(".") if site["part"] else ():
        part = getattr(part, name)
    if site["end"] == "input":
        # Other modules may use the same tensor, and a write must not change it for them.
        part.input = part.input.clone()
        value = part.input
    else:
        value = part.output
    value = value[0] if isinstance(value, tuple | list) else value
    if value.ndim > 2:  # noqa: PLR2004 (the flat one has two dimensions)
        return value
    batch, width = shape
    value = value.view(-1, width, value.shape[-1])
    return value if len(value) == batch else value[first : first + batch]


def in_read(value: torch.Tensor, places: Places) -> torch.Tensor:
    """Return the states at some places, (n, d_model)."""
    return value[in_sent(places["rows"], value.device), in_sent(places["positions"], value.device)]


def in_finals(logits: torch.Tensor, places: Places | None) -> list[torch.Tensor]:
    """Return next-token log-probabilities, a list of one (n, vocab) tensor, or empty for none."""
    return [] if places is None else [torch.log_softmax(in_read(logits, places).float(), dim=-1)]


def in_together(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Return tensors as one, on the device of the first; None if there are none."""
    if len(parts) < 2:  # noqa: PLR2004 (nothing to join)
        return parts[0] if parts else None
    return torch.cat([part.to(parts[0].device) for part in parts])


def in_rows(table: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Return some rows of a table; None if there is no table."""
    return None if table is None else table.detach()[in_sent(rows, table.device)]


def in_sums(states: torch.Tensor, sums: Sums | None) -> torch.Tensor:
    """Return the table of states with the rows of weighted sums added to it."""
    if sums is None:
        return states
    device, numbers = states.device, torch.promote_types(states.dtype, torch.float32)
    # A weight such as 1/3 has too few digits in half precision.
    weights = in_sent(sums["weights"], device, numbers)[:, None]
    terms = states[in_sent(sums["states"], device)] * weights
    summed = terms.new_zeros(sums["count"], states.shape[1]).index_add(
        0, in_sent(sums["into"], device), terms
    )
    return torch.cat([states, summed.to(states)])


def in_write(
    value: torch.Tensor, write: Write, states: torch.Tensor | None, writing: Writing
) -> dict[str, torch.Tensor]:
    """Map the states of one layer and write them, all rows at once.

    Returns:
        What was written, as in `PatchedRun.written`.
    """
    mode, device = writing["mode"], value.device
    rows, columns = in_sent(write["rows"], device), in_sent(write["positions"], device)
    clean = value[rows, columns]
    mapped = clean
    if states is not None and write["states"] is not None:
        incoming = in_sent(states[in_sent(write["states"], states.device)], device)
        mapped = apply_mapping(writing["mapping"], writing["weights"], incoming, clean, write["pairs"])
    if write["random"] is not None:
        which = write["random"]["which"].nonzero()[:, 0]
        seeds, draws = (in_sent(write["random"][name][which], device) for name in ("seeds", "draws"))
        index, noise = in_sent(which, device), in_normal(seeds, draws, clean)
        if mode != "noise":  # random directions, with the norms of the states that they replace
            norms = mapped[index].norm(dim=-1, keepdim=True)
            noise = noise * (norms / noise.norm(dim=-1, keepdim=True))
        mapped = mapped.index_copy(0, index, noise)
    if mode == "add_matched":
        mapped = mapped * (clean.norm(dim=-1, keepdim=True) / mapped.norm(dim=-1, keepdim=True))
    if write["scales"] is not None:
        # In single precision at least, as a product with a plain number.
        scales = in_sent(write["scales"], device, torch.promote_types(mapped.dtype, torch.float32))
        mapped = (mapped * scales[:, None]).to(mapped)
    written = in_mode(mode, writing["amount"], clean, mapped)
    value[rows, columns] = written
    parts = {"cells": in_sent(write["cells"], device), "states": written, "replaced": clean}
    if write["first"] is None:
        return parts
    # If several layers are written, the first write is reported.
    first = in_sent(write["first"], device)
    return {name: part[first] for name, part in parts.items()}


def in_written(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return what several layers have written as one."""
    return {name: in_together([part[name] for part in parts]) for name in parts[0]} if parts else {}


def in_mode(mode: str, amount: float, clean: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
    """Return the states after the write.

    Args:
        mode: The write mode.
        amount: The number of the mode.
        clean: (n, d_model) the previous states.
        mapped: (n, d_model) f(h), matched and scaled; for `noise`, standard normal numbers.
    """
    if mode in ("add", "add_matched"):
        return clean + mapped
    if mode == "blend":
        return amount * mapped + (1 - amount) * clean
    if mode == "zero":
        return torch.zeros_like(clean)
    if mode == "noise":
        return clean + amount * clean.std(dim=-1, keepdim=True) * mapped
    return mapped


def in_explained(
    columns: dict[str, Any],
    target: TargetProgram,
    states: torch.Tensor | None,
    written: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Add the column `not_finite` if a cell has a number that is not finite: where the first one arose."""
    readout, n_cells = target["readout"], target["cells"]
    replaced = in_cells_with(written, "replaced", n_cells)
    if readout["unembeds"]:
        sound = [columns.pop("sound")] if "sound" in columns else []
        bad = in_any(n_cells, [*sound, *(columns[name] for name in readout["finite"] if name in columns)])
        # A token that is ruled out (its logit is -inf) has an infinite log-probability, so only NaN counts.
        compared = in_any(n_cells, list(columns.values()), nan=True)
    else:
        bad = in_cells_with(written, "states", n_cells)
        compared = replaced if readout["clean"] else torch.zeros_like(bad)
    if not (bad | compared).any():
        return columns
    new = in_cells_with(written, "states", n_cells)
    read = torch.zeros_like(bad)
    for write in target["writes"].values():
        if states is not None and write["states"] is not None:
            wrong = ~states[write["states"].to(states.device)].float().isfinite().all(-1).cpu()
            read[write["cells"][wrong]] = True
    reasons: list[str | None] = []
    for cell in range(n_cells):
        reason = "compared" if compared[cell] else None
        if bad[cell]:
            reason = "logits"
            if new[cell]:
                reason = "replaced" if replaced[cell] else "written"
            if read[cell]:
                reason = "read"
        reasons.append(reason)
    return columns | {"not_finite": reasons}


def in_cells_with(written: dict[str, torch.Tensor], name: str, n_cells: int) -> torch.Tensor:
    """Return (n_cells,) which cells have written, or replaced, a state that is not finite."""
    if not written:
        return torch.zeros(n_cells, dtype=torch.bool)
    wrong = ~written[name].float().isfinite().all(-1)
    # Counted on the device: to choose the cells there, the host would have to wait for their number.
    counts = torch.zeros(n_cells, dtype=torch.int32, device=wrong.device)
    return counts.index_add(0, written["cells"], wrong.int()).cpu() > 0


def in_any(n_cells: int, columns: list[Any], *, nan: bool = False) -> torch.Tensor:
    """Return (n_cells,) which cells have a number that is not finite, or with `nan` one that is NaN."""
    cells = torch.zeros(n_cells, dtype=torch.bool)
    for column in columns:
        if isinstance(column, torch.Tensor):
            if column.is_floating_point():
                wrong = column.isnan() if nan else ~column.isfinite()
                cells |= wrong.reshape(n_cells, -1).any(-1).cpu()
        else:
            for cell, value in enumerate(column):
                # NaN differs from itself, and so does the difference of an infinity to itself.
                if any(number != number if nan else number - number != 0 for number in in_numbers(value)):  # noqa: PLR0124
                    cells[cell] = True
    return cells


def in_numbers(value: Any) -> list[float]:
    """Return the numbers in nested lists."""
    if isinstance(value, list):
        if {*map(type, value)} == {float}:
            return value
        return [number for part in value for number in in_numbers(part)]
    return [value] if isinstance(value, float) else []


def in_embedded(value: torch.Tensor, embedded: list[Embedded], soft: torch.Tensor | None) -> None:
    """Replace the first embeddings of rows by soft prompts, and add noise to embeddings."""
    for change in embedded:
        row, start = change["row"], change["start"]
        if change["soft"] and soft is not None:
            value[row, start : start + len(soft)] = soft.to(value)
        if change["noise"]:
            columns = change["positions"]
            seeds = torch.full((len(columns),), change["seed"], device=value.device)
            noise = in_normal(seeds, torch.arange(len(columns), device=value.device), value[row])
            # If T is read again, decoded tokens follow it; the spread is that of T alone.
            spread = value[row, start : change["end"]].std()
            value[row, columns] = value[row, columns] + change["noise"] * spread * noise


def in_cut(
    block: Any, cuts: list[Cut], attention_mask: torch.Tensor, names: list[str], window: int | None
) -> None:
    """Give a block an attention mask without the edges that are cut.

    Args:
        block: The block.
        cuts: The edges.
        attention_mask: (batch, width) True for tokens, False for padding.
        names: The names of the block's positional arguments.
        window: How many tokens back a token attends to in this block; None for all.
    """
    args, kwargs = block.inputs
    arguments = dict(zip(names, args, strict=False)) | kwargs
    hidden = arguments.pop(names[0])
    real = in_sent(attention_mask, hidden.device).bool()
    batch, width = real.shape
    allowed = torch.ones(width, width, dtype=torch.bool, device=hidden.device).tril()
    if window is not None:
        allowed = allowed & torch.ones_like(allowed).triu(1 - window)
    allowed = allowed[None] & real[:, None, :]
    # A padding token attends to itself: a softmax over nothing would be NaN.
    allowed = allowed | torch.eye(width, dtype=torch.bool, device=hidden.device)[None]
    for cut in cuts:
        for token in cut["positions"]:
            allowed[cut["row"], token, [unseen for unseen in cut["unseen"] if unseen != token]] = False
    mask = torch.zeros(batch, 1, width, width, dtype=hidden.dtype, device=hidden.device)
    arguments["attention_mask"] = mask.masked_fill(~allowed[:, None], torch.finfo(hidden.dtype).min)
    block.inputs = ((hidden,), arguments)


def in_readout(
    model: Any,
    readout: ReadoutProgram,
    logits: Any,
    cache: Any,
    *,
    finals: torch.Tensor | None,
    written: dict[str, torch.Tensor],
    plain: Any = None,
    hear: Any = None,
) -> dict[str, Any]:
    """Call the body of the readout. The prompts have been read, and nothing is patched from here on.

    Args:
        model: M*, as a function.
        readout: The program of the readout.
        logits: (n_cells, vocab) at the positions that are read; None for a readout that does not unembed.
        cache: Keys and values, a row for each cell; only for readouts that decode.
        finals: The distributions that source passes have read.
        written: As in `PatchedRun`.
        plain: M* without any patch, as a function; None if `model` is that.
        hear: Called while the pass runs (see `contexts.Hear`); may be None.

    Returns:
        The columns.
    """
    if hear is not None:
        hear([], [])
    known = ("n_cells", "numbered", "extra", "eos", "leaving", "mixed", "rereads", "stepwise")
    run = SimpleNamespace(
        forward=model,
        plain=plain or model,
        logits=logits,
        cache=cache,
        mask=None if readout["mask"] is None else in_sent(readout["mask"], logits.device),
        finals=finals,
        written=written,
        heard=hear,
        **{name: readout[name] for name in known},  # type: ignore[literal-required]
    )
    columns = readout["read"](run, **readout["asked"])
    if not isinstance(columns, dict):
        given = type(columns).__name__
        raise TypeError(f"the body of a readout returns a dict of columns, and not a {given}")
    if readout["unembeds"] and not readout["finite"] and "sound" not in columns:
        columns["sound"] = logits.float().amax(-1)
    # On a server, a mapping with parameters records gradients.
    return {name: in_here(part) for name, part in columns.items()}


def in_here(values: Any) -> Any:
    """Return a column on the CPU, without its gradients."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu()
    return [in_here(value) if isinstance(value, torch.Tensor) else value for value in values]
