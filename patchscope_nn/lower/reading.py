"""Programs of steps that write nothing: they only read states, or do nothing at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchscope_nn.body.program import Read, SitePath, SourceProgram, StepProgram, identity_writing
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
) -> StepProgram:
    """Return the program of a step that reads states of prompts and returns all of them.

    Args:
        rows: The token ids of each prompt, and the positions that are read from it.
        layers: The layers that are read; -1 is the input of block 0.
        info: The model.
        site: The name of the site.

    Returns:
        The program; `gathered` sorts the states that it returns.
    """
    inputs = batch_of([ids for ids, _ in rows], info, 0)
    width = inputs["input_ids"].shape[1]
    reads: dict[int, list[Read]] = {
        layer: [
            {
                "state": index * len(rows) + row,
                "row": row,
                "positions": [width - len(ids) + position for position in positions],
            }
            for row, (ids, positions) in enumerate(rows)
        ]
        for index, layer in enumerate(sorted(set(layers)))
    }
    source: SourceProgram = {
        "inputs": inputs,
        "options": options_of(info, keep=None, cache=False),
        "whole": False,
        "reads": reads,
        "finals": [],
    }
    return nothing(paths_of(info, site)) | {
        "sources": [source],
        "keep": [read["state"] for entries in reads.values() for read in entries],
    }


def nothing(site: SitePath | None = None) -> StepProgram:
    """Return the program of a step that does nothing. As a job, it shows whether a server still works."""
    path: SitePath = site or {"blocks": "", "part": "", "end": "output"}
    return {
        "sources": [],
        "targets": [],
        "prefix": None,
        "given": {},
        "sums": [],
        "keep": [],
        "writing": identity_writing(),
        "source_site": path,
        "target_site": path,
    }


def gathered(kept: dict[int, torch.Tensor], layers: Sequence[int], *, n_rows: int) -> dict[int, torch.Tensor]:
    """Return the states that a `reading` step has read, by layer.

    Args:
        kept: The states that the step returned.
        layers: As in `reading`.
        n_rows: The number of rows it read.

    Returns:
        For each layer, (n_positions, d_model) in the order of the rows.
    """
    return {
        layer: torch.cat([kept[index * n_rows + row] for row in range(n_rows)])
        for index, layer in enumerate(sorted(set(layers)))
    }
