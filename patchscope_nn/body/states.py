"""Reads and writes hidden states, inside a context.

Functions named `in_...` run inside a context, perhaps on a server. They take parts of a program (see
`program.py`), and use only torch, nnsight and other functions of `body`.
"""

from __future__ import annotations

from typing import Any

import torch

from patchscope_nn.body.devices import in_sent
from patchscope_nn.body.mappings import apply_mapping
from patchscope_nn.body.program import (
    Cut,
    Embedded,
    Places,
    SitePath,
    Sums,
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
