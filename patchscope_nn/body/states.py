"""Reads and writes hidden states, inside a context.

Functions named `in_...` run inside a context, perhaps on a server. They take parts of a program (see
`program.py`), and use only torch, nnsight and other functions of `body`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from patchscope_nn.body.mappings import apply_mapping
from patchscope_nn.body.program import (
    Cut,
    Embedded,
    Read,
    ReadoutProgram,
    SitePath,
    Sum,
    TargetProgram,
    Write,
    Writing,
)


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


def in_read(value: torch.Tensor, reads: list[Read]) -> dict[int, torch.Tensor]:
    """Return states by number, each (n_positions, d_model)."""
    counts = [len(read["positions"]) for read in reads]
    rows = [read["row"] for read in reads for _ in read["positions"]]
    gathered = value[rows, [position for read in reads for position in read["positions"]]]
    return {read["state"]: part for read, part in zip(reads, gathered.split(counts), strict=True)}


def in_finals(logits: torch.Tensor, finals: list[Read]) -> dict[int, torch.Tensor]:
    """Return next-token log-probabilities by number, each (vocab,)."""
    if not finals:
        return {}
    last = logits[[read["row"] for read in finals], [read["positions"][-1] for read in finals]]
    logprobs = torch.log_softmax(last.float(), dim=-1)
    return {read["state"]: row for read, row in zip(finals, logprobs, strict=True)}


def in_sums(states: dict[int, torch.Tensor], sums: list[Sum]) -> dict[int, torch.Tensor]:
    """Return weighted sums of states, by number; each term may first be averaged over its positions."""
    summed = {}
    for entry in sums:
        total: Any = None
        for number, weight in entry["terms"]:
            term = states[number].mean(0, keepdim=True) if entry["mean"] else states[number]
            total = term * weight if total is None else total + term.to(total) * weight
        summed[entry["state"]] = total
    return summed


def in_write(
    value: torch.Tensor, writes: list[Write], states: dict[Any, torch.Tensor], writing: Writing
) -> dict[int, list[torch.Tensor]]:
    """Map the states of one layer and write them, all rows at once.

    Returns:
        {cell: [new state, previous state]}, each (n_positions, d_model).
    """
    mode = writing["mode"]
    rows = [write["row"] for write in writes for _ in write["positions"]]
    columns = [position for write in writes for position in write["positions"]]
    counts = [len(write["positions"]) for write in writes]
    clean = value[rows, columns]
    mapped = clean
    if mode not in ("zero", "noise"):
        # One state is written at all positions; several are written one to one.
        incoming = [states[write["state"]].expand(len(write["positions"]), -1) for write in writes]
        together = torch.cat([state.to(value.device) for state in incoming])
        pairs = [write["pair"] for write in writes for _ in write["positions"]]
        mapped = apply_mapping(writing["mapping"], writing["weights"], together, clean, pairs)
    parts, previous = list(mapped.split(counts)), clean.split(counts)
    for number, write in enumerate(writes):
        if write["seed"] is not None:
            noise = mode == "noise"
            alike = not noise and len(states[write["state"]]) == 1
            parts[number] = in_random(parts[number], write["seed"], matched=not noise, alike=alike)
        if mode == "add_matched":
            norms = [part.norm(dim=-1, keepdim=True) for part in (previous[number], parts[number])]
            parts[number] = parts[number] * (norms[0] / norms[1])
        if write["scale"] != 1:
            parts[number] = parts[number] * write["scale"]
    written = in_mode(mode, writing["amount"], clean, torch.cat(parts))
    value[rows, columns] = written
    both = zip(written.split(counts), previous, strict=True)
    return {write["cell"]: [*pair] for write, pair in zip(writes, both, strict=True)}


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


def in_random(states: torch.Tensor, seed: int, *, matched: bool = True, alike: bool = False) -> torch.Tensor:
    """Return states of random direction with the norms of those they replace, or standard normal numbers.

    Args:
        states: (n, d_model) the states that they replace.
        seed: The seed.
        matched: True if they have the norms of `states`; else they are standard normal numbers.
        alike: True if all have the same direction, for one state that is written at several positions.
    """
    count = 1 if alike else len(states)
    noise = torch.randn(count, states.shape[1], generator=torch.Generator().manual_seed(seed)).to(states)
    noise = noise.expand_as(states)
    if not matched:
        return noise
    return noise * (states.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def in_explained(
    rows: list[dict[str, Any]],
    target: TargetProgram,
    states: dict[int, torch.Tensor],
    written: dict[int, Any],
) -> list[dict[str, Any]]:
    """Add `not_finite` to each row that has a number that is not finite: where the first of them arose."""
    for cell, row in enumerate(rows):
        parts = written.get(cell, ())
        if in_is_finite(row, parts, target["readout"]):
            if in_has_nan(row, parts, target["readout"]):
                row["not_finite"] = "compared"
            continue
        numbers = [
            write["state"]
            for writes in target["writes"].values()
            for write in writes
            if write["cell"] == cell and write["state"] is not None
        ]
        row["not_finite"] = "logits"
        if parts and not parts[0].isfinite().all():
            row["not_finite"] = "written" if parts[1].isfinite().all() else "replaced"
        if any(not states[number].isfinite().all() for number in numbers):
            row["not_finite"] = "read"
    return rows


def in_is_finite(row: dict[str, Any], parts: Any, readout: ReadoutProgram) -> bool:
    """Return True if the numbers that a row was read from are finite, and remove `sound` from the row.

    `parts` are the states that its cell wrote and replaced. A readout that does not unembed reads only these,
    and they are faster to check than the row's lists.
    """
    if not readout["unembeds"]:
        return not parts or bool(parts[0].float().isfinite().all())
    sound = [row.pop("sound")] if "sound" in row else []
    numbers = in_numbers([sound, *(row[name] for name in readout["finite"] if name in row)])
    return all(abs(number) < float("inf") for number in numbers)


def in_has_nan(row: dict[str, Any], parts: Any, readout: ReadoutProgram) -> bool:
    """Return True if a number of a row is NaN, or if a replaced state that the readout uses is not finite.

    A token that is ruled out (its logit is -inf) has an infinite log-probability, so only NaN counts.
    """
    if not readout["unembeds"]:
        return bool(readout["clean"] and parts) and not parts[1].float().isfinite().all()
    numbers = in_numbers([*row.values()])
    return any(number != number for number in numbers)  # noqa: PLR0124 (only a NaN does)


def in_numbers(value: Any) -> list[float]:
    """Return the numbers in nested lists."""
    if isinstance(value, list):
        if {*map(type, value)} == {float}:
            return value
        return [number for part in value for number in in_numbers(part)]
    return [value] if isinstance(value, float) else []


def in_embedded(value: torch.Tensor, embedded: list[Embedded], states: dict[int, torch.Tensor]) -> None:
    """Replace the first embeddings of rows by soft prompts, and add noise to embeddings."""
    for change in embedded:
        row, start = change["row"], change["start"]
        if change["soft"] is not None:
            soft = states[change["soft"]].to(value)
            value[row, start : start + len(soft)] = soft
        if change["noise"]:
            columns = change["positions"]
            noise = in_random(value[row, columns], change["seed"], matched=False)
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
    real = attention_mask.to(hidden.device).bool()
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
    states: dict[int, torch.Tensor],
    written: dict[int, Any],
    plain: Any = None,
    hear: Any = None,
) -> list[dict[str, Any]]:
    """Call the body of the readout. The prompts have been read, and nothing is patched from here on.

    Args:
        model: M*, as a function.
        readout: The program of the readout.
        logits: (n_cells, vocab) at the positions that are read; None for a readout that does not unembed.
        cache: Keys and values, a row for each cell; only for readouts that decode.
        states: The states and distributions that source passes have read, by number.
        written: By cell, the states that were written and those they replaced.
        plain: M* without any patch, as a function; None if `model` is that.
        hear: Called while the pass runs (see `contexts.Hear`); may be None.

    Returns:
        One dict for each cell.
    """
    if hear is not None:
        hear([], [])
    known = ("n_cells", "numbered", "extra", "eos", "leaving", "mixed", "rereads", "stepwise")
    run = SimpleNamespace(
        forward=model,
        plain=plain or model,
        logits=logits,
        cache=cache,
        mask=None if readout["mask"] is None else readout["mask"].to(logits.device),
        states=states,
        written=written,
        heard=hear,
        **{name: readout[name] for name in known},  # type: ignore[literal-required]
    )
    rows = readout["read"](run, **readout["asked"])
    if readout["unembeds"] and not readout["finite"]:
        for row, top in zip(rows, logits.float().amax(-1).tolist(), strict=True):
            row["sound"] = top
    return rows
