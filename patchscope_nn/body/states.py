"""Reading and writing hidden states, inside a context.

Functions named `in_...` run inside a context, on whatever machine that is: they take what `unpack` made
(ints, strings, lists, tensors) and use torch, nnsight and functions of this package that take the same.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from patchscope_nn.body.mappings import apply_mapping
from patchscope_nn.body.program import Work


def in_blocks(model: Any, paths: dict[str, str]) -> Any:
    """The list of decoder blocks."""
    part = model
    for name in paths["blocks"].split("."):
        part = getattr(part, name)
    return part


def in_site(model: Any, paths: dict[str, str], layer: int, one: Work, *, first: int = 0) -> Any:
    """The tensor at a layer, (batch, n_tokens, d_model). Modules give it, or a tuple or list that begins so.

    OPT's MLP gives it flat, (batch * n_tokens, d_model); of a flat tensor nnsight does not know which rows
    are this invoke's, so that in a fused trace those from `first` on are taken here.
    """
    blocks = in_blocks(model, paths)
    if layer < 0:
        return blocks[0].input
    part = blocks[layer]
    for name in paths["part"].split(".") if paths["part"] else ():
        part = getattr(part, name)
    value = part.output
    value = value[0] if isinstance(value, tuple | list) else value
    if value.ndim > 2:  # noqa: PLR2004 (the flat one has two dimensions)
        return value
    batch, width = one["inputs"]["input_ids"].shape
    value = value.view(-1, width, value.shape[-1])
    return value if len(value) == batch else value[first : first + batch]


def in_read(value: torch.Tensor, reads: list[Any]) -> dict[int, torch.Tensor]:
    """States by number, each (n_positions, d_model)."""
    rows = [row for _, row, positions in reads for _ in positions]
    gathered = value[rows, [at for _, _, positions in reads for at in positions]]
    parts = gathered.split([len(positions) for _, _, positions in reads])
    return {number: part for (number, _, _), part in zip(reads, parts, strict=True)}


def in_finals(logits: torch.Tensor, finals: list[Any]) -> dict[int, torch.Tensor]:
    """Unpatched next-token log-probabilities by number, each (vocab,)."""
    if not finals:
        return {}
    read = logits[[row for _, row, _ in finals], [position for _, _, position in finals]]
    logprobs = torch.log_softmax(read.float(), dim=-1)
    return {number: one for (number, *_), one in zip(finals, logprobs, strict=True)}


def in_sums(states: dict[int, torch.Tensor], sums: list[Any]) -> dict[int, torch.Tensor]:
    """States that are made of others: weighted sums, and means over their positions."""
    made = {}
    for number, parts, mean in sums:
        terms = [states[one].mean(0, keepdim=True) if mean else states[one] for one, _ in parts]
        total = terms[0] * parts[0][1]
        for term, (_, weight) in zip(terms[1:], parts[1:], strict=True):
            total = total + term.to(total) * weight
        made[number] = total
    return made


def in_write(
    value: torch.Tensor, writes: list[Any], states: dict[int, torch.Tensor], how: Work
) -> dict[int, list[torch.Tensor]]:
    """Write the mapped states of one layer, all rows at once; give, by cell, what stands there and stood."""
    rows = [one["row"] for one in writes for _ in one["positions"]]
    places = [at for one in writes for at in one["positions"]]
    counts = [len(one["positions"]) for one in writes]
    clean = value[rows, places]
    mapped = clean
    if how["mode"] not in ("zero", "noise"):
        # One state is written at all positions; several are, one to one.
        incoming = [states[one["state"]].expand(len(one["positions"]), -1) for one in writes]
        together = torch.cat([one.to(value.device) for one in incoming])
        pairs = [one["pair"] for one in writes for _ in one["positions"]]
        mapped = apply_mapping(how["mapping"][0], how["mapping"][1], together, clean, pairs)
    parts, there = list(mapped.split(counts)), clean.split(counts)
    for place, one in enumerate(writes):
        if one["seed"] is not None:
            noise = how["mode"] == "noise"
            alike = not noise and len(states[one["state"]]) == 1
            parts[place] = in_random(parts[place], one["seed"], matched=not noise, alike=alike)
        if how["mode"] == "add_matched":
            norms = [part.norm(dim=-1, keepdim=True) for part in (there[place], parts[place])]
            parts[place] = parts[place] * (norms[0] / norms[1])
        if one["scale"] != 1:
            parts[place] = parts[place] * one["scale"]
    written = in_mode(how["mode"], how["amount"], clean, torch.cat(parts))
    value[rows, places] = written
    both = zip(written.split(counts), there, strict=True)
    return {one["cell"]: list(two) for one, two in zip(writes, both, strict=True)}


def in_mode(mode: str, amount: float, clean: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
    """What stands there after the write.

    Args:
        mode: The name of the write.
        amount: Its number.
        clean: (n, d_model) what stood there.
        mapped: (n, d_model) f(h), matched and scaled; for `noise` numbers of mean 0 and variance 1.
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
    """States of random direction, each with the norm of the one it stands for; or standard normal numbers.

    Args:
        states: (n, d_model) what they stand for.
        seed: What they start from.
        matched: Whether they have the norms of the states.
        alike: Whether all have one direction, as one state has that is written at several positions.
    """
    count = 1 if alike else len(states)
    noise = torch.randn(count, states.shape[1], generator=torch.Generator().manual_seed(seed)).to(states)
    noise = noise.expand_as(states)
    if not matched:
        return noise
    return noise * (states.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def in_explained(
    rows: list[dict[str, Any]], one: Work, states: dict[int, torch.Tensor], written: dict[int, Any]
) -> list[dict[str, Any]]:
    """Say of each row whose numbers are not finite where the first such number was, as `not_finite`."""
    for cell, row in enumerate(rows):
        parts = written.get(cell, ())
        if in_is_finite(row, parts, one["readout"]):
            if in_has_nan(row, parts, one["readout"]):
                row["not_finite"] = "compared"
            continue
        numbers = [
            entry["state"]
            for _, entries in one["writes"]
            for entry in entries
            if entry["cell"] == cell and entry["state"] is not None
        ]
        row["not_finite"] = "logits"
        if parts and not parts[0].isfinite().all():
            row["not_finite"] = "written" if parts[1].isfinite().all() else "replaced"
        if any(not states[number].isfinite().all() for number in numbers):
            row["not_finite"] = "read"
    return rows


def in_is_finite(row: dict[str, Any], parts: Any, readout: Work) -> bool:
    """True if what a row was read from is finite; `sound` is taken out of the row.

    `parts` are the states that its cell wrote and replaced. They are all that a readout reads which does not
    unembed, and are faster to look at than its lists.
    """
    if not readout["unembeds"]:
        return not parts or bool(parts[0].float().isfinite().all())
    sound = [row.pop("sound")] if "sound" in row else []
    numbers = in_numbers([sound, *(row[name] for name in readout["finite"] if name in row)])
    return all(abs(number) < float("inf") for number in numbers)


def in_has_nan(row: dict[str, Any], parts: Any, readout: Work) -> bool:
    """True if a number of a row is NaN, or a replaced state that the readout looks at is not finite.

    A token with a logit of -inf is ruled out: its log-probability is infinite, and is a number.
    """
    if not readout["unembeds"]:
        return bool(readout["clean"] and parts) and not parts[1].float().isfinite().all()
    numbers = in_numbers([*row.values()])
    return any(number != number for number in numbers)  # noqa: PLR0124 (only a NaN does)


def in_numbers(value: Any) -> list[float]:
    """The numbers in nested lists."""
    if isinstance(value, list):
        if {*map(type, value)} == {float}:
            return value
        return [number for part in value for number in in_numbers(part)]
    return [value] if isinstance(value, float) else []


def in_embedded(value: torch.Tensor, embedded: list[Any], states: dict[int, torch.Tensor]) -> None:
    """Put learned embeddings at the beginning of rows, and noise on others."""
    for one in embedded:
        row, start = one["row"], one["start"]
        if one["soft"] is not None:
            soft = states[one["soft"]].to(value)
            value[row, start : start + len(soft)] = soft
        if one["noise"]:
            places = one["positions"]
            noise = in_random(value[row, places], one["seed"], matched=False)
            # Where T is read again, what was decoded stands behind it.
            own = value[row, start : one["end"]]
            value[row, places] = value[row, places] + one["noise"] * own.std() * noise


def in_cut(block: Any, cuts: list[Any], one: Work, layer: int) -> None:
    """Give a block an attention mask without the edges that are cut."""
    args, kwargs = block.inputs
    given = dict(zip(one["names"], args, strict=False)) | kwargs
    hidden, window = given.pop(one["names"][0]), one["windows"][layer]
    real = one["inputs"]["attention_mask"].to(hidden.device).bool()
    batch, width = real.shape
    allowed = torch.ones(width, width, dtype=torch.bool, device=hidden.device).tril()
    if window is not None:
        allowed = allowed & torch.ones_like(allowed).triu(1 - window)
    allowed = allowed[None] & real[:, None, :]
    # A padding token sees itself: a softmax over nothing would be no number.
    allowed = allowed | torch.eye(width, dtype=torch.bool, device=hidden.device)[None]
    for row, tokens, unseen in cuts:
        for token in tokens:
            allowed[row, token, [at for at in unseen if at != token]] = False
    mask = torch.zeros(batch, 1, width, width, dtype=hidden.dtype, device=hidden.device)
    given["attention_mask"] = mask.masked_fill(~allowed[:, None], torch.finfo(hidden.dtype).min)
    block.inputs = ((hidden,), given)


def in_readout(
    model: Any,
    readout: Work,
    logits: Any,
    cache: Any,
    *,
    states: dict[int, torch.Tensor],
    written: dict[int, Any],
    plain: Any = None,
) -> list[dict[str, Any]]:
    """Call the body of the readout. The prompt has been read: nothing from here on is patched.

    Args:
        model: M*, as a function.
        readout: What `lower` made of it; `mask` is the attention mask of the prompts behind `cache`.
        logits: (n_cells, vocab) at the positions that are read; None for a readout that does not unembed.
        cache: Keys and values, a row for each cell; only for readouts that decode.
        states: What source passes read, for the reference distributions.
        written: By cell, what was written and what it replaced.
        plain: M* without any patch, as a function, where `model` is not that.

    Returns:
        One dict for each cell.
    """
    heard = readout.get("heard")
    if heard is not None:
        heard([], [])
    known = ("n_cells", "numbered", "extra", "eos", "leaving", "mixed", "rereads", "stepwise")
    run = SimpleNamespace(
        forward=model,
        plain=plain or model,
        logits=logits,
        cache=cache,
        mask=readout["mask"].to(logits.device) if readout["decodes"] else None,
        states=states,
        written=written,
        heard=heard,
        **{name: readout[name] for name in known},
    )
    rows = readout["read"](run, **readout["asked"])
    if readout["unembeds"] and not readout["finite"]:
        for row, top in zip(rows, logits.float().amax(-1).tolist(), strict=True):
            row["sound"] = top
    return rows
