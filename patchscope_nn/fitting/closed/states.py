"""Paired states: what two models, or two layers of one, have at the same places of the same texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from patchscope_nn.backends import Backend, Bridged
from patchscope_nn.fitting.closed.align import aligned
from patchscope_nn.lower import gathered, reading
from patchscope_nn.mappings import Pair
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.spec import Fit, site_named
from patchscope_nn.spec.prompts import encode

#: Texts that are sorted by length together, and the most tokens of one pass.
_SORTED, _TOKENS = 128, 4096


class Paired(NamedTuple):
    """States of the same places.

    Attributes:
        source: By l, (n, d_model of the source).
        target: By l*, (n, d_model of the target).
        texts: How many texts they are of.
    """

    source: dict[int, torch.Tensor]
    target: dict[int, torch.Tensor]
    texts: int


class _Row(NamedTuple):
    """A text as both models read it, and the positions that are taken, one to one."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Reads paired states.

    Attributes:
        source: M.
        target: M*; the same object where there is one model, which is then run once.
        backend: Where the models run.
        sites: The name of the site that is read on each side.
        options: How many positions of how many tokens are taken, and the seed.
        skip: How many tokens at a text's beginning are left out; position 0 is an attention sink.
    """

    source: Model
    target: Model
    backend: Backend
    sites: tuple[str, str]
    options: Fit
    skip: int = 1

    def stream(self, texts: Sequence[str], pairs: Sequence[Pair]) -> Iterator[Paired]:
        """Yield the states of the layers of some pairs, a batch of texts at a time; no batch is kept.

        A text in which no token ends where one of the other model's does gives nothing.
        """
        layers = sorted({pair[0] for pair in pairs}), sorted({pair[1] for pair in pairs})
        for start in range(0, len(texts), _SORTED):
            chunk = texts[start : start + _SORTED]
            rows = [row for text in chunk if (row := self._row(text)) is not None]
            rows.sort(key=lambda row: (len(row.source), len(row.target)))
            left = len(chunk)
            models = (self.source.info, self.target.info)
            mixed = all(mixes_lengths(info, rows) for info in models)
            alone = not all(info.verdict is None or info.verdict.batches for info in models)
            for batch in _batches(rows, mixed=mixed, alone=alone):
                left -= len(batch)
                yield self._read(batch, layers)._replace(texts=len(batch))
            if left:
                yield Paired({}, {}, left)

    def _row(self, text: str) -> _Row | None:
        most = self.options.max_tokens
        read = encode(text, self.source.tokenizer, field="a text")
        other = read if self._one_tokenizer else encode(text, self.target.tokenizer, field="a text")
        places = aligned(read, other, skip=self.skip, most=most)
        if self.options.positions is not None and len(places) > self.options.positions:
            chooser = random.Random(f"{self.options.seed} {text}")  # noqa: S311 (a seeded choice, no secret)
            places = sorted(chooser.sample(places, self.options.positions))
        if not places:
            return None
        # In a causal model what stands behind the last position that is read makes no difference to it.
        causal = all(model.info.architecture.causal for model in (self.source, self.target))
        ends = [1 + places[-1][side] if causal else None for side in (0, 1)]
        return _Row(read.ids[: ends[0]], other.ids[: ends[1]], tuple(places))

    def is_one(self, pair: Pair) -> bool:
        """Whether a pair is a place of one model and itself."""
        return self.source is self.target and self.sites[0] == self.sites[1] and pair[0] == pair[1]

    @property
    def widths(self) -> tuple[int, int]:
        """The sizes of the states of the source and of the target."""
        read, other = map(site_named, self.sites)
        return self.source.info.width(read), self.target.info.width(other)

    @property
    def _one_tokenizer(self) -> bool:
        return self.source.tokenizer is self.target.tokenizer

    def _read(self, rows: Sequence[_Row], layers: tuple[list[int], list[int]]) -> Paired:
        source = [(row.source, [place for place, _ in row.places]) for row in rows]
        if self.source is self.target and self.sites[0] == self.sites[1] and self._one_tokenizer:
            states = self._states(self.source, source, [*layers[0], *layers[1]], side=0)
            return Paired(
                {layer: states[layer] for layer in layers[0]},
                {layer: states[layer] for layer in layers[1]},
                0,
            )
        target = [(row.target, [place for _, place in row.places]) for row in rows]
        return Paired(
            self._states(self.source, source, layers[0], side=0),
            self._states(self.target, target, layers[1], side=1),
            0,
        )

    def _states(
        self,
        model: Model,
        rows: Sequence[tuple[tuple[int, ...], Sequence[int]]],
        layers: Sequence[int],
        *,
        side: int,
    ) -> dict[int, torch.Tensor]:
        backend = self.backend
        if isinstance(backend, Bridged):
            backend = backend.target if side else backend.source
        program = reading(rows, layers, model.info, site=self.sites[side])
        kept = backend.run("session", program, source=model, target=model)["kept"]
        return gathered(kept, layers, n_rows=len(rows))


def mixes_lengths(info: ModelInfo, rows: Sequence[_Row]) -> bool:
    """Whether a model may read texts of different lengths in one pass, as its proof found."""
    longest = max((max(len(row.source), len(row.target)) for row in rows), default=0)
    return info.verdict is None or not info.verdict.withholds("mixed_lengths", tokens=longest)


def _batches(rows: Sequence[_Row], *, mixed: bool, alone: bool) -> Iterator[Sequence[_Row]]:
    """Rows that are run together: of about one length, or unless `mixed` of just one; not too many tokens.

    Where `alone`, each has a pass of its own.
    """
    start = 0
    for stop in range(1, len(rows) + 1):
        lengths = len(rows[stop - 1].source), len(rows[stop - 1].target)
        last = stop == len(rows)
        other = not (last or mixed) and lengths != (len(rows[stop].source), len(rows[stop].target))
        if last or other or alone or (stop + 1 - start) * max(lengths) > _TOKENS:
            yield rows[start:stop]
            start = stop


#: Called with (texts done, texts in all).
Progress = Callable[[int, int], None]
