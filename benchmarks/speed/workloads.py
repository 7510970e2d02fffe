"""What is swept: prompts, layers and a readout, the same for every contender.

A cell is (row, l, l*): the state of source prompt `row` at its last token after block l, written after block
l* of the target prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch

from patchscope_nn.mappings import Affine

SEED = 0
_Item = TypeVar("_Item")


class Cell(NamedTuple):
    """One cell: the source prompt's number, l and l*."""

    row: int
    layer: int
    target_layer: int


class Said(NamedTuple):
    """What a cell says.

    Attributes:
        said: The next token's id, or the generated text.
        logprob: That token's log-probability in nats; None for a text.
    """

    said: int | str
    logprob: float | None = None


Answers = dict[Cell, Said]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A sweep.

    Attributes:
        name: W1 and so on.
        title: What it is, in a line.
        texts: The source prompts, each read at its last token.
        sources: The same as ids.
        target: The target prompt, as ids.
        position: Where it is written, from the end: -1 is its last token.
        layers: Every l.
        target_layers: Every l*; None where l* is l.
        max_new_tokens: How many tokens are decoded; 0 for the next token alone.
        eos: Ids that end a text.
        mapping: f; None is the identity.
        cross: Whether source and target are two models.
        long: Whether a cell takes so many tokens that batched contenders too are timed on a part.
        chosen: The cells, where it is not all of them.
    """

    name: str
    title: str
    texts: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    target: tuple[int, ...]
    position: int = -1
    layers: tuple[int, ...]
    target_layers: tuple[int, ...] | None = None
    max_new_tokens: int = 0
    eos: tuple[int, ...] = ()
    mapping: Affine | None = None
    cross: bool = False
    long: bool = False
    chosen: tuple[Cell, ...] | None = None

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells, by source prompt, l and l*."""
        if self.chosen is not None:
            return self.chosen
        return tuple(
            Cell(row, layer, target_layer)
            for row in range(len(self.sources))
            for layer in self.layers
            for target_layer in ((layer,) if self.target_layers is None else self.target_layers)
        )

    def sample(self, count: int, *, seed: int = SEED) -> Workload:
        """The same with `count` of its cells, drawn at random, spread over l* as the whole is."""
        cells = list(self.cells)
        random.Random(seed).shuffle(cells)  # noqa: S311 (a seeded choice, no secret)
        cells.sort(key=lambda cell: cell.target_layer)  # the sort is stable: random within each l*
        return replace(self, chosen=tuple(sorted(_spread(cells, count))))

    def smaller(self, count: int) -> Workload:
        """A sweep of about `count` of its cells, and no fewer: for contenders that run sweeps, not cells.

        Its source prompts are the first ones, which are in no order.
        """
        if self.target_layers is None or len(self.sources) > 1:
            rows = -(-count * len(self.sources) // len(self.cells))
            return replace(self, texts=self.texts[:rows], sources=self.sources[:rows])
        side = 1 + int((count - 1) ** 0.5)
        layers, target_layers = _spread(self.layers, side), _spread(self.target_layers, side)
        return replace(self, layers=tuple(layers), target_layers=tuple(target_layers))

    def fewer_targets(self, count: int) -> Workload:
        """The same with some of its l*, for about `count` cells: for those who batch what has one l*."""
        layers = self.layers if self.target_layers is None else self.target_layers
        some = tuple(_spread(layers, -(-count * len(layers) // len(self.cells))))
        return replace(self, layers=some) if self.target_layers is None else replace(self, target_layers=some)

    def mapped(self, states: torch.Tensor) -> torch.Tensor:
        """States as they are written, (..., d_model of the target)."""
        return states if self.mapping is None else self.mapping(states)


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """So many of some items, at even distances."""
    step = len(items) / min(count, len(items))
    return [items[int((place + 0.5) * step)] for place in range(min(count, len(items)))]


def text_of(ids: list[int], workload: Workload, tokenizer: Any) -> str:
    """A generated text, up to the token that ends it."""
    end = next((place for place, token in enumerate(ids) if token in workload.eos), len(ids))
    return str(tokenizer.decode(ids[:end]))


def disagreement(one: Answers, other: Answers, *, tolerance: float = 1e-4) -> str:
    """What is wrong with two contenders' answers to the cells that both gave; empty where they agree."""
    both = one.keys() & other.keys()
    said = sum(one[cell].said != other[cell].said for cell in both)
    pairs = [(one[cell].logprob, other[cell].logprob) for cell in both]
    worst = max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)
    wrong = [f"{said} of {len(both)} cells say something else"] if said else []
    if worst > tolerance:
        wrong.append(f"log-probabilities differ by up to {worst:.1e} nats")
    return "; ".join(wrong)
