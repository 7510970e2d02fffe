"""Lowers packed target passes, with segments of one sequence (see `plan/layout.py`), to plain values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from patchscope_nn._util.ragged import ranges
from patchscope_nn.body.program import CellRows, PackedProgram
from patchscope_nn.lower.readout import readout_of
from patchscope_nn.lower.rows import writes_of
from patchscope_nn.lower.states import StateTable
from patchscope_nn.models import Model
from patchscope_nn.plan import Layout, Plan, shares_attention, why_copied
from patchscope_nn.spec.layers import EMBED
from patchscope_nn.sweep import CellBlock


def target_segments(
    plan: Plan, block: CellBlock, layout: Layout, table: StateTable, target: Model
) -> PackedProgram:
    """Return the program of a packed target pass."""
    sweep, info, decodes = plan.sweep, target.info, plan.sweep.scope.readout.decodes
    first, count = layout.first, layout.count
    positions = ranges(first, count)
    ids = sweep.target_tokens.values[ranges(sweep.target_tokens.starts[layout.prompt] + first, count)]
    inputs = {"input_ids": torch.from_numpy(ids)[None]}
    if info.supports("positions"):
        inputs["position_ids"] = torch.from_numpy(positions)[None]
    read = torch.from_numpy(layout.at(layout.of_cell, sweep.read_at[block.target_prompt]))
    width = int(sweep.target_tokens.counts[block.target_prompt[0]])
    options: dict[str, Any] = {"use_cache": True}
    if plan.optimisations.lean_readout and info.supports("few_logits"):
        options["logits_to_keep"] = read
    separately = shares_attention(sweep, plan.optimisations, block, prefix=layout.prefix)
    first_held = 0 if why_copied(sweep, plan.optimisations, block) else layout.prefix
    seen = np.where(layout.is_branch, np.minimum(first - layout.prefix, layout.trunk_count), 0)
    of_tokens = {
        name: torch.from_numpy(np.repeat(part, count))
        for name, part in (("starts", layout.offset), ("trunks", layout.trunk_offset), ("seen", seen))
    }
    return {
        "layout": "packed",
        "cells": len(block),
        "inputs": inputs,
        "options": options,
        "writes": writes_of(
            block,
            table,
            rows=np.zeros(len(block), np.int64),
            shifts=layout.at(layout.of_cell, np.zeros(len(block), np.int64)),
        ),
        "readout": readout_of(plan, block, table, target, torch.ones(len(block), width, dtype=torch.long)),
        "windows": list(info.architecture.windows),
        "names": [name for name in info.architecture.block_arguments if name != "self"],
        "depth": layout.depth,
        "entering": layout.running(EMBED),
        "bases": _bases(layout),
        "prefix": layout.prefix,
        "n_tokens": layout.n_tokens,
        "starts": of_tokens["starts"],
        "trunks": of_tokens["trunks"],
        "seen": of_tokens["seen"],
        "most_own": int((seen + count).max()) if separately else None,
        "key_positions": torch.from_numpy(np.concatenate([np.arange(layout.prefix), positions])),
        "tuples": info.architecture.gives_tuples,
        "read": read,
        "rows": _rows(layout, width, first=first_held) if decodes else None,
    }


def _bases(layout: Layout) -> dict[int, torch.Tensor]:
    """Return by layer, for each token that joins after it, the index of the token whose state it takes."""
    bases: dict[int, torch.Tensor] = {}
    for layer in np.unique(layout.enters[layout.enters > EMBED]).tolist():
        joins = layout.enters == layer
        first, count = layout.first[joins] - layout.prefix, layout.count[joins]
        in_trunk = ranges(first, count) < np.repeat(layout.trunk_count[joins], count)
        base = ranges(first + layout.trunk_offset[joins], count)
        bases[layer] = torch.from_numpy(np.where(in_trunk, base, 0))
    return bases


def _rows(layout: Layout, width: int, *, first: int) -> CellRows:
    """Return where the tokens of each cell's whole prompt are in prefix and segments: (n_cells, n_tokens).

    `own` follows the cell's branch, and `clean` its trunk. `enters` is the layer after which `own` holds.
    """
    at, prefix, segment = np.arange(width), layout.prefix, layout.of_cell[:, None]
    of_trunk = np.where(at < prefix, at, layout.trunk_offset[segment] + at)
    own = np.where(at < layout.first[segment], of_trunk, prefix + layout.at(segment, at))
    # A branch that enters before block 0 needs no more of its trunk than it attends to.
    clean = np.where(at < prefix + layout.trunk_count[segment], of_trunk, own)
    enters = torch.from_numpy(layout.enters[layout.of_cell])
    return {
        "own": torch.from_numpy(own),
        "clean": torch.from_numpy(clean),
        "enters": enters,
        "first": first,
    }
