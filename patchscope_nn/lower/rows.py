"""Lowers passes over padded batches, with one prompt in each row, to plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from patchscope_nn.body.program import Cut, Embedded, RowsProgram, Write
from patchscope_nn.lower.readout import readout_of
from patchscope_nn.lower.written import WrittenStates
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.plan import Plan, from_cache
from patchscope_nn.spec import read_position
from patchscope_nn.sweep import Cell


def batch_of(
    rows: Sequence[tuple[int, ...]], info: ModelInfo, width: int, *, numbered: bool = False
) -> dict[str, torch.Tensor]:
    """Return left-padded ids, their mask and positions, as keyword arguments of the model.

    Args:
        rows: The ids of each row.
        info: The model.
        width: The width of the batch that these rows are a part of; 0 if they are the whole batch.
        numbered: True if positions are passed even if no row is padded.
    """
    numbered = numbered or width > 0
    width = max(width, *(len(row) for row in rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    # Without padding, a model numbers the positions itself; in some families they do not begin at 0.
    if info.supports("positions") and (numbered or not mask.all()):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs


_Entry = TypeVar("_Entry")


def by_layer(entries: Iterable[tuple[int, _Entry]]) -> dict[int, list[_Entry]]:
    """Group entries by layer, in the order a forward pass reaches them (embeddings, -1, come first)."""
    groups: dict[int, list[_Entry]] = {}
    for layer, entry in entries:
        groups.setdefault(layer, []).append(entry)
    return {layer: groups[layer] for layer in sorted(groups)}


def options_of(info: ModelInfo, *, keep: int | None, cache: bool) -> dict[str, Any]:
    """Return further arguments of the model; `keep` last positions are unembedded, or all if None."""
    options: dict[str, Any] = {"use_cache": cache} if info.supports("cache") else {}
    if keep is not None and info.supports("few_logits"):
        options["logits_to_keep"] = keep
    return options


def target_rows(
    plan: Plan, cells: Sequence[Cell], written: WrittenStates, target: Model, width: int
) -> RowsProgram:
    """Return the program of a target pass over a padded batch."""
    prompts = [plan.sweep.target_prompts[cell.target_prompt].ids for cell in cells]
    decodes = plan.sweep.scope.readout.decodes
    cached = decodes and from_cache(plan.sweep, plan.optimisations)
    # Decoding numbers its tokens from 0 on, so the prompt whose keys and values it uses must be numbered too.
    inputs = batch_of(prompts, target.info, width, numbered=cached)
    padded = inputs["input_ids"].shape[1]
    shifts = [padded - len(prompt) for prompt in prompts]
    writes = [
        (layer, entry)
        for row, (cell, shift) in enumerate(zip(cells, shifts, strict=True))
        for layer, entry in writes_of(cell, row, [shift + at for at in cell.target_positions], written, row)
    ]
    readout = readout_of(plan, cells, written.numbers, target, inputs["attention_mask"])
    readout_scope, target_scope = plan.sweep.scope.readout, plan.sweep.scope.target
    positions = [read_position(readout_scope, len(prompt)) - len(prompt) for prompt in prompts]
    return {
        "layout": "rows",
        "cells": len(cells),
        "inputs": inputs,
        "options": options_of(
            target.info, keep=-min(positions) if plan.optimisations.lean_readout else None, cache=cached
        ),
        "writes": by_layer(writes),
        "embedded": [
            _embedded(plan, cell, row, shift, written)
            for row, (cell, shift) in enumerate(zip(cells, shifts, strict=True))
        ]
        if target_scope.corrupt or target_scope.soft_prompt
        else [],
        "cuts": by_layer(_cuts(plan, cells, shifts)),
        "windows": list(target.info.architecture.windows),
        "names": [name for name in target.info.architecture.block_arguments if name != "self"],
        "rereads": decodes and not cached,
        "every_step": decodes and target_scope.every_step,
        "positions": positions,
        "readout": readout,
    }


def writes_of(
    cell: Cell, row: int, positions: list[int], written: WrittenStates, index: int
) -> Iterator[tuple[int, Write]]:
    """Yield (layer, write) for all that a cell writes; `index` counts the cell within its pass."""
    target = written.sweep.scope.target
    if target.cut is not None:
        return
    seeded = cell.control == "random" or target.mode == "noise"
    sweep = written.sweep
    for (layer, target_layer), pair in zip(sweep.writes(cell), sweep.pairs(cell), strict=True):
        yield (
            target_layer,
            {
                "state": written.number(cell, layer),
                "row": row,
                "positions": positions,
                "seed": cell.seed if seeded else None,
                "pair": pair,
                "scale": cell.scale,
                "cell": index,
            },
        )


def _embedded(plan: Plan, cell: Cell, row: int, shift: int, written: WrittenStates) -> Embedded:
    """Return the changes to the embeddings of a row: a soft prompt at its start, then noise."""
    corrupt = plan.sweep.scope.target.corrupt
    entry = plan.sweep.entries[cell.entry]
    # A draw of noise is the same for all cells of a prompt, so that they differ only in the patch.
    seed = f"{plan.sweep.seed} {cell.sample} {plan.sweep.target_prompts[cell.target_prompt].ids}"
    return {
        "row": row,
        "start": shift,
        "end": shift + len(plan.sweep.target_prompts[cell.target_prompt].ids),
        "soft": written.soft if not entry.text_only else None,
        "noise": corrupt.noise if corrupt and entry.corrupted else 0.0,
        "positions": [shift + at for at in entry.corrupted],
        "seed": int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]),
    }


def _cuts(plan: Plan, cells: Sequence[Cell], shifts: Sequence[int]) -> Iterator[tuple[int, Cut]]:
    """Yield (layer, cut) for every row and every layer that is cut."""
    if plan.sweep.scope.target.cut is None:
        return
    for row, (cell, shift) in enumerate(zip(cells, shifts, strict=True)):
        for _, layer in plan.sweep.writes(cell):
            yield (
                layer,
                {
                    "row": row,
                    "positions": [shift + position for position in cell.target_positions],
                    "unseen": [shift + position for position in cell.unseen],
                },
            )
