"""Paired states: the states of two models, or of two layers of one, at the same places of the same texts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from patchscope_nn.backends import Backend, Bridged
from patchscope_nn.fitting.closed.align import aligned
from patchscope_nn.fitting.reading import Row, batches, read_pass
from patchscope_nn.mappings import Pair
from patchscope_nn.models import Model
from patchscope_nn.spec import Fit, site_named
from patchscope_nn.spec.encoding import encode

#: How many texts are sorted by length together.
_SORTED = 128


class Paired(NamedTuple):
    """States of the same places of `texts` texts: by l and by l*, (n, d_model) each."""

    source: dict[int, torch.Tensor]
    target: dict[int, torch.Tensor]
    texts: int


class _Row(NamedTuple):
    """A text as both models read it, and the positions that are read, as (source, target) pairs."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Reads paired states of M and M*. If they are the same object, it runs once.

    Attributes:
        source: M.
        target: M*.
        backend: Where the models run.
        sites: The name of the site that is read on each side.
        options: How many positions of how many tokens are read, and the seed.
        skip: How many tokens at the beginning of a text are left out; position 0 is an attention sink.
    """

    source: Model
    target: Model
    backend: Backend
    sites: tuple[str, str]
    options: Fit
    skip: int = 1

    def stream(self, texts: Sequence[str], pairs: Sequence[Pair]) -> Iterator[Paired]:
        """Yield the states at the layers of some pairs, one batch of texts at a time; none is kept.

        A text without a shared token end has no states, but is counted in `texts`.
        """
        layers = sorted({pair[0] for pair in pairs}), sorted({pair[1] for pair in pairs})
        for start in range(0, len(texts), _SORTED):
            chunk = texts[start : start + _SORTED]
            rows = [row for text in chunk if (row := self._row(text)) is not None]
            rows.sort(key=lambda row: (len(row.source), len(row.target)))
            models = (self.source.info, self.target.info)
            for batch in batches(rows, lambda row: (len(row.source), len(row.target)), models):
                yield self._read(batch, layers)._replace(texts=len(batch))
            if without := len(chunk) - len(rows):
                yield Paired({}, {}, without)

    def is_identity(self, pair: Pair) -> bool:
        """True if both sides of a pair are the same layer and site of one model."""
        return self.source is self.target and self.sites[0] == self.sites[1] and pair[0] == pair[1]

    def _row(self, text: str) -> _Row | None:
        source = encode(text, self.source.tokenizer, field="a text")
        target = source if self._one_tokenizer else encode(text, self.target.tokenizer, field="a text")
        positions = aligned(source, target, skip=self.skip, most=self.options.max_tokens)
        if self.options.positions is not None and len(positions) > self.options.positions:
            chooser = random.Random(f"{self.options.seed} {text}")  # noqa: S311 (a seeded choice, no secret)
            positions = sorted(chooser.sample(positions, self.options.positions))
        if not positions:
            return None
        # In a causal model, tokens after the last position that is read do not change its state.
        causal = all(model.info.architecture.causal for model in (self.source, self.target))
        ends = [1 + positions[-1][side] if causal else None for side in (0, 1)]
        return _Row(source.ids[: ends[0]], target.ids[: ends[1]], tuple(positions))

    @property
    def widths(self) -> tuple[int, int]:
        """The sizes of the states of the source and of the target."""
        read, other = map(site_named, self.sites)
        return self.source.info.width(read), self.target.info.width(other)

    @property
    def _one_tokenizer(self) -> bool:
        return self.source.tokenizer is self.target.tokenizer

    def _read(self, rows: Sequence[_Row], layers: tuple[list[int], list[int]]) -> Paired:
        source = [Row(row.source, [position for position, _ in row.positions]) for row in rows]
        if self.source is self.target and self.sites[0] == self.sites[1] and self._one_tokenizer:
            states = self._states(source, [*layers[0], *layers[1]], side=0)
            of_source, of_target = ({layer: states[layer] for layer in side} for side in layers)
            return Paired(of_source, of_target, texts=0)
        target = [Row(row.target, [position for _, position in row.positions]) for row in rows]
        return Paired(
            self._states(source, layers[0], side=0), self._states(target, layers[1], side=1), texts=0
        )

    def _states(self, rows: Sequence[Row], layers: Sequence[int], *, side: int) -> dict[int, torch.Tensor]:
        backend, model = self.backend, (self.source, self.target)[side]
        if isinstance(backend, Bridged):
            backend = (backend.source, backend.target)[side]
        return read_pass(rows, layers, model, backend=backend, site=self.sites[side])
