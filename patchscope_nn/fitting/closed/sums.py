"""Streamed sums for least squares: the count, means and products of states, in float64.

No state is kept. Sums are taken about a fixed point near the mean, because in some dimensions the mean of the
states is far larger than their spread, and precision would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from patchscope_nn.mappings import Pair

_BYTES = 8


class Centred(NamedTuple):
    """Sums over `n` states of one pair: their products about a mean of x and a mean of y."""

    n: int
    mean_x: torch.Tensor  # (d_in,)
    mean_y: torch.Tensor  # (d_out,)
    xx: torch.Tensor  # (d_in, d_in) sum of (x - mean_x)(x - mean_x)^T
    xy: torch.Tensor  # (d_in, d_out) sum of (x - mean_x)(y - mean_y)^T
    yy: torch.Tensor  # sum of |y - mean_y|^2


class Sums:
    """Streamed sums over `n` states of some pairs of layers.

    Args:
        pairs: The pairs.
        about: The points that sums are taken about, by side (`x` or `y`) and layer. A missing point is set to
            the mean of the first batch. Sums that are added together must share this dictionary.
    """

    def __init__(self, pairs: Sequence[Pair], about: dict[tuple[str, int], torch.Tensor]) -> None:
        self.pairs, self.about, self.n = tuple(pairs), about, 0
        self.x: dict[int, torch.Tensor] = {}
        self.y: dict[int, torch.Tensor] = {}
        self.xx: dict[int, torch.Tensor] = {}
        self.yy: dict[int, torch.Tensor] = {}
        self.xy: dict[Pair, torch.Tensor] = {}

    def add(self, source: Mapping[int, torch.Tensor], target: Mapping[int, torch.Tensor]) -> None:
        """Add a batch of states of the same places: by l, (n, d_in), and by l*, (n, d_out)."""
        x = {layer: self._shifted("x", layer, source[layer]) for layer in {pair[0] for pair in self.pairs}}
        y = {layer: self._shifted("y", layer, target[layer]) for layer in {pair[1] for pair in self.pairs}}
        self.n += len(next(iter(x.values())))
        for layer, states in x.items():
            _accumulate(self.x, layer, states.sum(0))
            _accumulate(self.xx, layer, states.T @ states)
        for layer, states in y.items():
            _accumulate(self.y, layer, states.sum(0))
            _accumulate(self.yy, layer, (states * states).sum())
        for layer, other in self.pairs:
            _accumulate(self.xy, (layer, other), x[layer].T @ y[other])

    def plus(self, other: Sums) -> Sums:
        """The sums over the states of both, which must share the points they are taken about."""
        both = Sums(self.pairs, self.about)
        both.n = self.n + other.n
        for name in ("x", "y", "xx", "yy", "xy"):
            left, right = getattr(self, name), getattr(other, name)
            setattr(both, name, {key: left[key] + right[key] for key in left})
        return both

    def centred(
        self, pair: Pair, *, mean_x: torch.Tensor | None = None, mean_y: torch.Tensor | None = None
    ) -> Centred:
        """The products of a pair's states about the given means, or about their own."""
        layer, other = pair
        x0, y0 = self.about["x", layer], self.about["y", other]
        mean_x = x0 + self.x[layer] / self.n if mean_x is None else mean_x
        mean_y = y0 + self.y[other] / self.n if mean_y is None else mean_y
        x, y, dx, dy = self.x[layer], self.y[other], mean_x - x0, mean_y - y0
        xx = self.xx[layer] - torch.outer(x, dx) - torch.outer(dx, x) + self.n * torch.outer(dx, dx)
        xy = self.xy[pair] - torch.outer(x, dy) - torch.outer(dx, y) + self.n * torch.outer(dx, dy)
        return Centred(self.n, mean_x, mean_y, xx, xy, self.yy[other] - 2 * y @ dy + self.n * dy @ dy)

    def _shifted(self, side: str, layer: int, states: torch.Tensor) -> torch.Tensor:
        states = states.detach().to("cpu", torch.float64)
        if (side, layer) not in self.about:
            self.about[side, layer] = states.mean(0)
        return states - self.about[side, layer]


def size(pairs: Sequence[Pair], d_in: int, d_out: int) -> int:
    """The size in bytes of the sums over some pairs."""
    layers = len({pair[0] for pair in pairs})
    return _BYTES * (layers * d_in * d_in + len(pairs) * d_in * d_out)


def _accumulate(sums: dict[Any, torch.Tensor], key: Any, value: torch.Tensor) -> None:
    total = sums.get(key)
    sums[key] = value if total is None else total.add_(value)
