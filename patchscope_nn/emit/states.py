"""Reading and writing hidden states, inside a context.

Functions named `in_...` run inside a context, on whatever machine that is: they take what `unpack` made
(ints, strings, lists, tensors) and use torch, nnsight and functions of this package that take the same.
"""

from __future__ import annotations

from typing import Any

import torch

from patchscope_nn.mappings import apply_mapping
from patchscope_nn.readouts import read_choices, read_generate, read_next_token
from patchscope_nn.unpack import Work


def in_blocks(model: Any, paths: dict[str, str]) -> Any:
    """The list of decoder blocks."""
    part = model
    for name in paths["blocks"].split("."):
        part = getattr(part, name)
    return part


def in_site(model: Any, paths: dict[str, str], layer: int, one: Work, *, first: int = 0) -> Any:
    """The tensor at a layer, (batch, n_tokens, d_model). Modules give it, or a tuple that starts with it.

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
    value = value[0] if isinstance(value, tuple) else value
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


def in_write(
    value: torch.Tensor, writes: list[Any], states: dict[int, torch.Tensor], mapping: list[Any]
) -> dict[int, list[list[float]]]:
    """Write the mapped states of one layer, all rows at once; give what was written, by cell."""
    rows = [row for _, row, positions, *_ in writes for _ in positions]
    places = [at for _, _, positions, *_ in writes for at in positions]
    incoming = torch.cat([states[number].to(value.device) for number, *_ in writes])
    mapped = apply_mapping(mapping[0], mapping[1], incoming, value[rows, places])
    parts = list(mapped.split([len(positions) for _, _, positions, *_ in writes]))
    for place, (*_, seed, _) in enumerate(writes):
        if seed is not None:
            parts[place] = in_random(parts[place], seed)
    value[rows, places] = torch.cat(parts)
    return {cell: part for (*_, cell), part in zip(writes, parts, strict=True)}


def in_random(states: torch.Tensor, seed: int) -> torch.Tensor:
    """States of random direction, each with the norm of the one it stands for."""
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed)).to(states)
    return noise * (states.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def in_hidden(cells: int, written: dict[int, torch.Tensor]) -> list[dict[str, Any]]:
    """What was written for each cell of a pass; an unpatched one has nothing."""
    return [{"hidden": written[cell].float().tolist() if cell in written else None} for cell in range(cells)]


def in_readout(
    model: Any, readout: Work, logits: torch.Tensor, cache: Any, states: dict[int, torch.Tensor]
) -> list[dict[str, Any]]:
    """Call the readout a pass asks for. The prompt has been read: nothing from here on is patched.

    Args:
        model: M*, as a function.
        readout: What `unpack` made of it; `mask` is the attention mask of the prompts behind `cache`.
        logits: (n_cells, vocab) at the positions that are read.
        cache: Keys and values, a row for each cell; only for readouts that decode.
        states: What source passes read, for the reference distributions.

    Returns:
        One dict for each cell.
    """
    heard = readout.get("heard")
    if heard is not None:
        heard([], [])
    if readout["name"] == "next_token":
        return read_next_token(
            logits,
            top_k=readout["top_k"],
            references=readout["references"],
            source_logprobs={number: states[number] for number in readout["before"]},
            compared=readout["before"],
            from_source=readout["from_source"],
        )
    mask = readout["mask"].to(logits.device)
    if readout["name"] == "choices":
        return read_choices(
            model,
            logits,
            cache,
            mask,
            numbered=readout["numbered"],
            continuations=readout["continuations"],
        )
    return read_generate(
        model,
        logits,
        cache,
        mask,
        extra=readout["extra"],
        numbered=readout["numbered"],
        max_new_tokens=readout["max_new_tokens"],
        eos=readout["eos"],
        stops=readout["stops"],
        temperature=readout["temperature"],
        seeds=readout["seeds"],
        leaving=readout["leaving"],
        heard=heard,
    )
