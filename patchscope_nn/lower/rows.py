"""Lowers passes over padded batches, with one prompt in each row, to plain values."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from patchscope_nn._util.ragged import Ints, Ragged
from patchscope_nn.body.program import Cut, Embedded, RowsProgram, Write
from patchscope_nn.lower.readout import readout_of
from patchscope_nn.lower.states import StateTable
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.plan import Plan, from_cache
from patchscope_nn.sweep import CellBlock


def batch_of(
    tokens: Ragged, rows: Ints, info: ModelInfo, width: int, *, numbered: bool = False
) -> dict[str, torch.Tensor]:
    """Return left-padded ids, their mask and positions, as keyword arguments of the model.

    Args:
        tokens: The ids of prompts.
        rows: The prompt of each row.
        info: The model.
        width: The width of the batch that these rows are a part of; 0 if they are the whole batch.
        numbered: True if positions are passed even if no row is padded.
    """
    numbered = numbered or width > 0
    counts = tokens.counts[rows]
    width = max(width, int(counts.max()))
    mask = np.arange(width) >= width - counts[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = tokens.take(rows)[0]
    real = torch.from_numpy(mask.astype(np.int64))
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": real}
    # Without padding, a model numbers the positions itself; in some families they do not begin at 0.
    if info.supports("positions") and (numbered or not mask.all()):
        inputs["position_ids"] = (real.cumsum(-1) - 1).clamp_min(0)
    return inputs


def options_of(info: ModelInfo, *, keep: int | None, cache: bool) -> dict[str, Any]:
    """Return further arguments of the model; `keep` last positions are unembedded, or all if None."""
    options: dict[str, Any] = {"use_cache": cache} if info.supports("cache") else {}
    if keep is not None and info.supports("few_logits"):
        options["logits_to_keep"] = keep
    return options


def target_rows(plan: Plan, block: CellBlock, table: StateTable, target: Model, width: int) -> RowsProgram:
    """Return the program of a target pass over a padded batch."""
    sweep, scope = plan.sweep, plan.sweep.scope
    prompts = block.target_prompt
    cached = scope.readout.decodes and from_cache(sweep, plan.optimisations)
    # Decoding numbers its tokens from 0 on, so the prompt whose keys and values it uses must be numbered too.
    inputs = batch_of(sweep.target_tokens, prompts, target.info, width, numbered=cached)
    counts = sweep.target_tokens.counts[prompts]
    shifts = inputs["input_ids"].shape[1] - counts
    read = sweep.read_at[prompts] - counts
    rows = np.arange(len(block))
    return {
        "layout": "rows",
        "cells": len(block),
        "inputs": inputs,
        "options": options_of(
            target.info, keep=-int(read.min()) if plan.optimisations.lean_readout else None, cache=cached
        ),
        "writes": writes_of(block, table, rows=rows, shifts=shifts),
        "embedded": _embedded(plan, block, shifts),
        "cuts": _cuts(plan, block, shifts),
        "windows": list(target.info.architecture.windows),
        "names": [name for name in target.info.architecture.block_arguments if name != "self"],
        "rereads": scope.readout.decodes and not cached,
        "every_step": scope.readout.decodes and scope.target.every_step,
        "positions": torch.from_numpy(read),
        "readout": readout_of(plan, block, table, target, inputs["attention_mask"]),
    }


def writes_of(block: CellBlock, table: StateTable, *, rows: Ints, shifts: Ints) -> dict[int, Write]:
    """Return what the cells of a pass write, by layer in ascending order.

    Args:
        block: The cells.
        table: Where their states are.
        rows: The row of each cell in the batch.
        shifts: What turns a position of a cell's prompt into one of the batch.
    """
    sweep, scope = table.sweep, table.sweep.scope
    if scope.target.cut is not None:
        return {}
    writes = sweep.writes(block)
    at, write = sweep.cells.positions.take(block.positions[writes.cell])
    cell = writes.cell[write]
    # One state is written at all positions; several are written one to one.
    counts = np.bincount(write, minlength=len(writes.cell))
    place = np.arange(len(write)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns: dict[str, Ints] = {
        "cells": cell,
        "rows": rows[cell],
        "positions": at + shifts[cell],
    }
    draws = place
    if scope.target.needs_state:
        starts, sizes = table.of(block.read[writes.cell], writes.layer)
        draws = np.where(sizes[write] > 1, place, 0)
        columns["states"] = starts[write] + draws
    is_random = [scope.target.mode == "noise" or control == "random" for control in block.cells.controls]
    random = np.array(is_random)[block.control]
    layers = writes.target_layer[write]
    programs: dict[int, Write] = {}
    for layer in np.unique(layers).tolist():
        index = (layers == layer).nonzero()[0]
        of_cell, of_write = cell[index], write[index]
        parts = {name: torch.from_numpy(column[index]) for name, column in columns.items()}
        which, scales, first = random[of_cell], block.scale[of_cell], writes.first[of_write]
        programs[layer] = {
            "cells": parts["cells"],
            "rows": parts["rows"],
            "positions": parts["positions"],
            "states": parts.get("states"),
            "pairs": torch.from_numpy(np.stack([writes.layer[of_write], writes.mapped[of_write]], axis=1)),
            "scales": None if (scales == 1).all() else torch.from_numpy(scales),
            "random": None
            if not which.any()
            else {
                "which": torch.from_numpy(which),
                "seeds": torch.from_numpy(block.seed[of_cell]),
                "draws": torch.from_numpy(draws[index]),
            },
            "first": None if first.all() else torch.from_numpy(first),
        }
    return programs


def _embedded(plan: Plan, block: CellBlock, shifts: Ints) -> list[Embedded]:
    """Return the changes to the embeddings of the rows: a soft prompt at the start, then noise."""
    sweep, corrupt = plan.sweep, plan.sweep.scope.target.corrupt
    changes: list[Embedded] = []
    if not (corrupt or sweep.scope.target.soft_prompt):
        return changes
    for row, (cell, shift) in enumerate(zip(block, shifts.tolist(), strict=True)):
        entry, ids = sweep.entries[cell.entry], sweep.target_prompts[cell.target_prompt].ids
        # A draw of noise is the same for all cells of a prompt, so that they differ only in the patch.
        seed = f"{sweep.seed} {cell.sample} {ids}"
        changes.append(
            {
                "row": row,
                "start": shift,
                "end": shift + len(ids),
                "soft": sweep.scope.target.soft_prompt is not None and not entry.text_only,
                "noise": corrupt.noise if corrupt and entry.corrupted else 0.0,
                "positions": [shift + at for at in entry.corrupted],
                "seed": int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]),
            }
        )
    return changes


def _cuts(plan: Plan, block: CellBlock, shifts: Ints) -> dict[int, list[Cut]]:
    """Return, by layer, the attention edges that are cut in each row."""
    cuts: dict[int, list[Cut]] = {}
    if plan.sweep.scope.target.cut is None:
        return cuts
    writes, cells = plan.sweep.writes(block), list(block)
    order = np.argsort(writes.target_layer, kind="stable")
    for row, layer in zip(writes.cell[order].tolist(), writes.target_layer[order].tolist(), strict=True):
        cell, shift = cells[row], int(shifts[row])
        positions, unseen = ([shift + at for at in part] for part in (cell.target_positions, cell.unseen))
        cuts.setdefault(layer, []).append({"row": row, "positions": positions, "unseen": unseen})
    return cuts
