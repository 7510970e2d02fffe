"""Kinds that map a layer's states to the last block's, which the model's own unembedding then reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchscope_nn.errors import LayerError, MappingError
from patchscope_nn.fitting.planned import identity, same_model
from patchscope_nn.fitting.texts import DEFAULT_COLUMN, DEFAULT_DATA, column_texts
from patchscope_nn.fitting.trained.kind import MappingKind, Request, Rows
from patchscope_nn.fitting.trained.splits import split_texts
from patchscope_nn.mappings import Pair
from patchscope_nn.spec import RESIDUAL, Train
from patchscope_nn.spec.layers import EMBED

#: How many layers a message lists.
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class LastBlockKind(MappingKind):
    """A kind whose maps, with or without `bias`, go from layers of a model to its own last block."""

    bias: bool = True

    def shapes(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """As in `MappingKind`."""
        bias: dict[str, tuple[int, ...]] = {"bias": (d_model,)} if self.bias else {}
        return {"weight": (d_model, d_model), **bias}

    def check(self, request: Request) -> None:
        """As in `MappingKind`: there is one model, whose residual stream is written at the last block."""
        source, target = request.source, request.target
        # The weights of a model on a server cannot be compared; its name and revision can.
        same = same_model(source, target) or (request.away and identity(source)[:2] == identity(target)[:2])
        if not same or {*request.sites} != {RESIDUAL.name}:
            models = f"{source.info.name} and {target.info.name}"
            actual = f"sites {' and '.join(request.sites)}" if same else models
            raise MappingError(
                f"train.kind={self.name} maps outputs of a model's blocks to its own last block; this run "
                f"has {actual}.",
                hint=f"Take one model and site: {RESIDUAL.name} on both sides; between two models use "
                "{fit: affine}.",
            )
        last = target.info.n_layers - 1
        if others := sorted({layer for _, layer in request.pairs} - {last}):
            raise LayerError(
                f"train.kind={self.name} maps to the last block, which is {last}; this run writes at layer "
                f"{', '.join(map(str, others[:_LISTED]))}{', ...' * (len(others) > _LISTED)}.",
                hint="Write target.layer: -1.",
            )

    def arguments(self, request: Request, layers: Sequence[int]) -> dict[str, Any]:
        """As in `MappingKind`."""
        options = request.options
        how = {"training": self.training_of(options)} if self.training else {"seed": options.seed}
        named = ["embed" if layer == EMBED else layer for layer in layers]
        return {"layers": named, **self.own_options(options), **how}


@dataclass(frozen=True, kw_only=True)
class LensKind(LastBlockKind):
    """A kind that is fitted on texts, for which the map of the last block to itself is the identity.

    A text needs `least` tokens besides those that are skipped at its beginning.
    """

    least: int

    def learns(self, pair: Pair) -> bool:
        """As in `MappingKind`."""
        return pair[0] != pair[1]

    def column(self, options: Train) -> str | None:
        """As in `MappingKind`: the texts that ship with this package have a known column."""
        ships = options.data in (None, dict(DEFAULT_DATA))
        return DEFAULT_COLUMN if options.column is None and ships else options.column

    def check_data(self, request: Request, data: Rows) -> None:
        """As in `MappingKind`."""
        options = request.options
        shares = self.training_of(options).shares
        split_texts(
            column_texts(data.rows, data.column),
            request.source.tokenizer,
            max_tokens=self.option(options, "max_tokens"),
            least=self.option(options, "skip_first") + self.least,
            **(shares if self.training else shares | {"stopping": 0.0}),
        )
