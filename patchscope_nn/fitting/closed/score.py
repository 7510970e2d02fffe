"""Scores of maps on held-out texts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from patchscope_nn.fitting.closed.solve import Solution
from patchscope_nn.fitting.closed.states import Paired
from patchscope_nn.mappings import Pair, map_parts


class Scores:
    """Streamed sums over `n` held-out states, from which the scores of each pair's map are computed."""

    def __init__(self, solutions: Mapping[Pair, Solution]) -> None:
        self.solutions, self.n = solutions, 0
        self._errors, self._cosines, self._of_mean = (dict.fromkeys(solutions, 0.0) for _ in range(3))
        self._targets = {layer: Spread() for _, layer in solutions}

    def add(self, states: Paired) -> None:
        """Map a batch of source states and compare them with the target states."""
        self.n += len(next(iter(states.source.values())))
        targets = {layer: batch.cpu().double() for layer, batch in states.target.items()}
        for layer, spread in self._targets.items():
            spread.add(targets[layer])
        for pair, solution in self.solutions.items():
            x, y = states.source[pair[0]].cpu().float(), targets[pair[1]]
            mapped = map_parts(solution.parts, x).double()
            self._errors[pair] += float(((mapped - y) ** 2).sum())
            self._cosines[pair] += float(torch.cosine_similarity(mapped, y, dim=-1).sum())
            mean = solution.mean.double()
            self._of_mean[pair] += float(torch.cosine_similarity(mean.expand_as(y), y, dim=-1).sum())

    def numbers(self) -> dict[Pair, dict[str, float]]:
        """Compute the scores of each pair over all held-out states.

        Returns:
            `fraction_of_variance`: 1 - sum |f(x) - y|^2 / sum |y - mean of y|^2. `cosine`: the mean cosine of
            f(x) and y. `cosine_of_mean`: the mean cosine of y and the mean target state of the fit, a
            baseline that ignores x. `n`: the number of states.
        """
        return {
            pair: {
                "fraction_of_variance": 1 - self._errors[pair] / self._targets[pair[1]].variance,
                "cosine": self._cosines[pair] / self.n,
                "cosine_of_mean": self._of_mean[pair] / self.n,
                "n": self.n,
            }
            for pair in self.solutions
        }


class Spread:
    """The summed squared distance, `variance`, of `n` states to their mean, streamed (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.n, self.mean, self.variance = 0, torch.zeros(()), 0.0

    def add(self, states: torch.Tensor) -> None:
        """Add (n, d_model) states in float64."""
        count, mean = len(states), states.mean(0)
        within = float(((states - mean) ** 2).sum())
        between = float(((mean - self.mean) ** 2).sum()) * self.n * count / (self.n + count)
        self.variance += within + between
        self.mean = self.mean + (mean - self.mean) * count / (self.n + count)
        self.n += count
