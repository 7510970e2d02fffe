"""Means with 95 % intervals: a percentile bootstrap over data rows, so that a row's layers stay together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED = 2000, 0


class Interval(NamedTuple):
    """A mean, and where 95 % of the means of resampled rows lie."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(values: NDArray[np.float64]) -> Interval:
    """The interval of the mean of one value for each row.

    Args:
        values: (n_rows,)

    Returns:
        The mean and its interval.
    """
    return intervals(values[:, None])[0]


def intervals(values: NDArray[np.float64]) -> list[Interval]:
    """The intervals of the means of columns, over the same resampled rows.

    Args:
        values: (n_rows, n_columns)

    Returns:
        (n_columns,) means and their intervals.
    """
    n_rows = len(values)
    drawn = np.random.default_rng(SEED).integers(n_rows, size=(RESAMPLES, n_rows))
    counts = np.stack([np.bincount(one, minlength=n_rows) for one in drawn])
    low, high = np.percentile(counts @ values / n_rows, [2.5, 97.5], axis=0)
    return [
        Interval(float(mean), float(least), float(most))
        for mean, least, most in zip(values.mean(axis=0), low, high, strict=True)
    ]
