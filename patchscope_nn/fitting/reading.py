"""Hidden states of token sequences, read by the compiler: all that a fit reads without taking a gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from patchscope_nn.backends import Backend, Local
from patchscope_nn.lower import gathered, reading
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.spec import RESIDUAL

#: The most tokens of one forward pass, padding included.
_MAX_TOKENS = 4096

Item = TypeVar("Item")


class Row(NamedTuple):
    """The token ids of a sequence, and the positions where its states are read, from the left."""

    ids: tuple[int, ...]
    positions: Sequence[int]


def read_pass(
    rows: Sequence[Row],
    layers: Collection[int],
    model: Model,
    *,
    backend: Backend | None = None,
    site: str = RESIDUAL.name,
) -> dict[int, torch.Tensor]:
    """Read states of some rows in one forward pass, which stops after the last layer that is read.

    Layer -1 is the input of block 0. The model runs in this process unless a backend is given.

    Returns:
        For each layer (n_positions, d_model), in the order of the rows and of their positions.
    """
    wanted = sorted(set(layers))
    step = reading(rows, wanted, model.info, site=site)
    kept = (backend or Local()).run("session", step, source=model, target=model)["kept"]
    return gathered(kept, wanted)


def read_rows(rows: Sequence[Row], layers: Collection[int], model: Model) -> dict[int, list[torch.Tensor]]:
    """Read states of any number of rows, in as many forward passes as needed; arguments as in `read_pass`.

    Returns:
        For each layer one (n_positions, d_model) tensor a row, in the order of `rows`.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    states: dict[int, list[torch.Tensor]] = {layer: [torch.empty(0)] * len(rows) for layer in layers}
    for batch in batches(order, lambda index: (len(rows[index].ids),), (model.info,)):
        group = [rows[index] for index in batch]
        read = read_pass(group, layers, model)
        for layer in layers:
            parts = read[layer].split([len(row.positions) for row in group])
            for index, part in zip(batch, parts, strict=True):
                states[layer][index] = part
    return states


def batches(
    rows: Sequence[Item], lengths: Callable[[Item], tuple[int, ...]], models: Sequence[ModelInfo]
) -> Iterator[Sequence[Item]]:
    """Split rows into forward passes of limited size that the models are proven to read correctly.

    Where the proof of a model withholds mixed lengths, a pass has rows of one length; where it withholds
    batches, every row has a pass of its own.

    Args:
        rows: The rows, sorted by length.
        lengths: Gives the number of tokens of a row, for each model.
        models: The models that read the rows.
    """
    longest = max((max(lengths(row)) for row in rows), default=0)
    verdicts = [info.verdict for info in models if info.verdict is not None]
    mixed = not any(verdict.withholds("mixed_lengths", tokens=longest) for verdict in verdicts)
    alone = not all(verdict.batches for verdict in verdicts)
    start = 0
    for stop in range(1, len(rows) + 1):
        size = lengths(rows[stop - 1])
        last = stop == len(rows)
        differs = not (last or mixed) and size != lengths(rows[stop])
        if last or differs or alone or (stop + 1 - start) * max(size) > _MAX_TOKENS:
            yield rows[start:stop]
            start = stop
