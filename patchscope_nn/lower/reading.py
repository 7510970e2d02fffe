"""A step that only reads: the states of prompts at layers, and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from patchscope_nn.body.program import Work
from patchscope_nn.lower.rows import batch_of, options_of
from patchscope_nn.lower.step import paths_of
from patchscope_nn.models import ModelInfo
from patchscope_nn.spec import RESIDUAL


def reading(
    rows: Sequence[tuple[tuple[int, ...], Sequence[int]]],
    layers: Sequence[int],
    info: ModelInfo,
    *,
    site: str = RESIDUAL.name,
) -> Work:
    """Unpack what reads states, and gives all of them back.

    Args:
        rows: Token ids, and the positions that are read of them, from the left.
        layers: The layers that are read; -1 is the input of block 0.
        info: The model.
        site: The name of the site.

    Returns:
        A step, as `unpack` gives it; `gathered` takes its states apart.
    """
    inputs = batch_of([ids for ids, _ in rows], info, 0)
    width = inputs["input_ids"].shape[1]
    reads: list[Any] = [
        [
            layer,
            [
                [place * len(rows) + row, row, [width - len(ids) + at for at in positions]]
                for row, (ids, positions) in enumerate(rows)
            ],
        ]
        for place, layer in enumerate(sorted(set(layers)))
    ]
    numbers = [entry[0] for _, entries in reads for entry in entries]
    source = {
        "inputs": inputs,
        "options": options_of(info, keep=None, cache=False),
        "whole": False,
        "reads": reads,
        "finals": [],
    }
    return {
        "sources": [source],
        "targets": [],
        "prefix": None,
        "carried": {},
        "sums": [],
        "fresh": numbers,
        "keep": numbers,
        "how": {"mapping": ["identity", None], "mode": "replace", "amount": 0.0},
        "source_paths": paths_of(info, site),
        "target_paths": paths_of(info, site),
    }


def gathered(kept: dict[int, torch.Tensor], layers: Sequence[int], *, n_rows: int) -> dict[int, torch.Tensor]:
    """What `reading` read, by layer.

    Args:
        kept: What the step gave.
        layers: As in `reading`.
        n_rows: The number of rows it read.

    Returns:
        For each layer (n_positions, d_model) in the order of the rows.
    """
    return {
        layer: torch.cat([kept[place * n_rows + row] for row in range(n_rows)])
        for place, layer in enumerate(sorted(set(layers)))
    }
