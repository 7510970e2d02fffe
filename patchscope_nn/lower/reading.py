"""Programs of steps that write nothing: they only read states, or do nothing at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from patchscope_nn._util.ragged import Ragged
from patchscope_nn.body.program import Places, SitePath, SourceProgram, StepProgram
from patchscope_nn.lower.mapping import identity_writing
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
    tokens, positions = Ragged(ids for ids, _ in rows), Ragged(at for _, at in rows)
    everything = np.arange(len(rows))
    inputs = batch_of(tokens, everything, info, 0)
    at, row = positions.take(everything)
    places: Places = {
        "rows": torch.from_numpy(row),
        "positions": torch.from_numpy(at + inputs["input_ids"].shape[1] - tokens.counts[row]),
    }
    wanted = sorted(set(layers))
    source: SourceProgram = {
        "inputs": inputs,
        "options": options_of(info, keep=None, cache=False),
        "whole": False,
        "reads": dict.fromkeys(wanted, places),
        "finals": None,
    }
    return nothing(paths_of(info, site)) | {"sources": [source], "keep": torch.arange(len(wanted) * len(at))}


def nothing(site: SitePath | None = None) -> StepProgram:
    """Return the program of a step that does nothing. As a job, it shows whether a server still works."""
    nowhere: SitePath = {"blocks": "", "part": "", "end": "output", "terms": 1, "argument": (0, "")}
    path = site or nowhere
    return {
        "sources": [],
        "targets": [],
        "prefix": None,
        "given": None,
        "given_finals": None,
        "sums": None,
        "soft": None,
        "keep": torch.arange(0),
        "keep_finals": torch.arange(0),
        "writing": identity_writing(),
        "source_site": path,
        "target_site": path,
    }


def gathered(kept: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return the states that a `reading` step has read, by layer.

    Args:
        kept: The states that the step returned.
        layers: As in `reading`.

    Returns:
        For each layer, (n_positions, d_model) in the order of the rows.
    """
    wanted = sorted(set(layers))
    return dict(zip(wanted, kept.chunk(len(wanted)), strict=True))
