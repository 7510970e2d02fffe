"""Lowers packed target passes, with segments of one sequence (see `plan/layout.py`), to plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from patchscope_nn.body.program import CellRows, OwnTokens, PackedProgram, Write
from patchscope_nn.lower.readout import readout_of
from patchscope_nn.lower.rows import by_layer, writes_of
from patchscope_nn.lower.written import WrittenStates
from patchscope_nn.models import Model
from patchscope_nn.plan import Layout, Plan, Segment, shares_attention
from patchscope_nn.spec import read_position
from patchscope_nn.spec.layers import EMBED
from patchscope_nn.sweep import Cell


def target_segments(
    plan: Plan, cells: Sequence[Cell], layout: Layout, written: WrittenStates, target: Model
) -> PackedProgram:
    """Return the program of a packed target pass."""
    segments, info = layout.segments, target.info
    ids = [
        token
        for segment in segments
        for token in plan.sweep.target_prompts[segment.prompt].ids[segment.first : segment.last]
    ]
    positions = [at for segment in segments for at in range(segment.first, segment.last)]
    inputs = {"input_ids": torch.tensor([ids])}
    if info.supports("positions"):
        inputs["position_ids"] = torch.tensor([positions])
    writes: list[tuple[int, Write]] = []
    for number, cell in enumerate(cells):
        if cell.target_layer is not None:
            branch = segments[layout.of_cell[number]]
            tokens = [branch.at(at) for at in cell.target_positions]
            writes += writes_of(cell, 0, tokens, written, number)
    read = [_read_token(plan, cell, segments[at]) for cell, at in zip(cells, layout.of_cell, strict=True)]
    decodes = plan.sweep.scope.readout.decodes
    width = len(plan.sweep.target_prompts[cells[0].target_prompt].ids)
    mask = torch.ones(len(cells), width, dtype=torch.long)
    options: dict[str, Any] = {"use_cache": True}
    if plan.optimisations.lean_readout and info.supports("few_logits"):
        options["logits_to_keep"] = torch.tensor(read)
    separately = shares_attention(plan.sweep, plan.optimisations, cells, prefix=layout.prefix)
    return {
        "layout": "packed",
        "cells": len(cells),
        "inputs": inputs,
        "options": options,
        "writes": by_layer(writes),
        "readout": readout_of(plan, cells, written.numbers, target, mask),
        "windows": list(info.architecture.windows),
        "names": [name for name in info.architecture.block_arguments if name != "self"],
        "depth": layout.depth,
        "entering": layout.running(EMBED),
        "bases": _bases(segments),
        "prefix": layout.prefix,
        "n_tokens": layout.n_tokens,
        "own": _own(layout) if separately else None,
        "allowed": None if separately else _allowed(layout),
        "key_positions": torch.tensor([*range(layout.prefix), *positions]),
        "tuples": info.architecture.gives_tuples,
        "read": read,
        "rows": _rows(layout, width) if decodes else None,
    }


def _read_token(plan: Plan, cell: Cell, segment: Segment) -> int:
    whole = len(plan.sweep.target_prompts[cell.target_prompt].ids)
    return segment.at(read_position(plan.sweep.scope.readout, whole))


def _bases(segments: Sequence[Segment]) -> dict[int, list[int | None]]:
    """Return {layer: for each token that joins after it, the index of the unpatched token it starts from}."""
    bases: dict[int, list[int | None]] = {}
    for segment in segments:
        if segment.enters > EMBED:
            trunk = None if segment.trunk is None else segments[segment.trunk]
            bases.setdefault(segment.enters, []).extend(
                None if trunk is None or at >= trunk.last else trunk.at(at)
                for at in range(segment.first, segment.last)
            )
    return bases


def _allowed(layout: Layout) -> torch.Tensor:
    """Return (n_tokens, n_prefix + n_tokens): True if a token attends to another."""
    prefix, total = layout.prefix, layout.n_tokens
    allowed = torch.zeros(total, prefix + total, dtype=torch.bool)
    allowed[:, :prefix] = True
    for segment in layout.segments:
        size = segment.last - segment.first
        rows = slice(segment.offset, segment.offset + size)
        own = prefix + segment.offset
        allowed[rows, own : own + size] = torch.ones(size, size, dtype=torch.bool).tril()
        if segment.trunk is not None:
            trunk = layout.segments[segment.trunk]
            start = prefix + trunk.offset
            allowed[rows, start : start + min(segment.first, trunk.last) - trunk.first] = True
    return allowed


def _own(layout: Layout) -> OwnTokens:
    """Return the tokens after the prefix that each token attends to."""
    seen = []
    for segment in layout.segments:
        before: list[int] = []
        if segment.trunk is not None:
            trunk = layout.segments[segment.trunk]
            before = list(range(trunk.offset, trunk.offset + min(segment.first, trunk.last) - trunk.first))
        seen += [
            [*before, *range(segment.offset, segment.offset + at + 1)]
            for at in range(segment.last - segment.first)
        ]
    most = max(map(len, seen))
    return {
        "places": torch.tensor([tokens + [0] * (most - len(tokens)) for tokens in seen]),
        "real": torch.tensor([[True] * len(tokens) + [False] * (most - len(tokens)) for tokens in seen]),
    }


def _rows(layout: Layout, width: int) -> CellRows:
    """Return where the tokens of each cell's whole prompt are in prefix and segments: (n_cells, n_tokens).

    `own` follows the cell's branch, and `clean` its trunk. `enters` is the layer after which `own` holds.
    """
    own, clean, enters = [], [], []
    for at in layout.of_cell:
        segment = layout.segments[at]
        trunk = segment if segment.trunk is None else layout.segments[segment.trunk]
        shared = list(range(layout.prefix))
        of_trunk = [
            *shared,
            *(layout.prefix + trunk.at(position) for position in range(layout.prefix, width)),
        ]
        of_branch = [layout.prefix + segment.at(position) for position in range(segment.first, width)]
        clean.append(of_trunk)
        own.append([*of_trunk[: segment.first], *of_branch])
        enters.append(segment.enters)
    return {"own": torch.tensor(own), "clean": torch.tensor(clean), "enters": torch.tensor(enters)}
