"""Whether two engines gave the same table: the same cells, texts and top tokens, up to rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

#: The largest difference of a probability.
TOLERANCE = 1e-3
#: Ranks may differ where the logits are nearly equal; by this share, and at least by one.
_OF_RANK = 0.01


def assert_one_table(found: pd.DataFrame, expected: pd.DataFrame, *, tolerance: float = TOLERANCE) -> None:
    """Compare the tables of one sweep on two engines, cell by cell.

    Tokens whose probabilities are equal up to the tolerance may change places.
    """
    assert [*found.columns] == [*expected.columns]
    assert len(found) == len(expected)
    wrong = []
    for number, (one, other) in enumerate(
        zip(found.to_dict("records"), expected.to_dict("records"), strict=True)
    ):
        tied = _tied(one, other, tolerance)
        for name, value in one.items():
            if name in tied or _close(value, other[name], tolerance * _scale(name)):
                continue
            if "rank" in name and _near_ranks(value, other[name]):
                continue
            wrong.append(f"cell {number}, {name}: {value!r} instead of {other[name]!r}")
    assert not wrong, "\n".join([f"{len(wrong)} differences", *wrong[:20]])


def _scale(name: str) -> float:
    """Nats and norms are rounded more coarsely than probabilities."""
    return 1 if "prob" in name else 10


def _tied(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> set[str]:
    """The columns that differ only because tokens of nearly equal probability have changed places."""
    if "top_ids" not in one:
        return set()
    ids, probs = ([list(cell[name]) for cell in (one, other)] for name in ("top_ids", "top_probs"))
    if ids[0] == ids[1] or len(ids[0]) != len(ids[1]):
        return set()
    if not _close(probs[0], probs[1], tolerance):
        return set()
    for place, pair in enumerate(zip(*ids, strict=True)):
        if pair[0] == pair[1]:
            continue
        # A token that moved has a neighbour, or the last place, of nearly equal probability.
        known = [dict(zip(*side, strict=True)) for side in zip(ids, probs, strict=True)]
        last = probs[1][-1]
        if any(abs(side.get(token, last) - probs[1][place]) > tolerance for side in known for token in pair):
            return set()
    return {"top_ids", "top_tokens"}


def _near_ranks(one: Any, other: Any) -> bool:
    ranks = [np.atleast_1d(np.asarray(value, dtype=float)) for value in (one, other)]
    if ranks[0].shape != ranks[1].shape:
        return False
    return bool((np.abs(ranks[0] - ranks[1]) <= np.maximum(1, _OF_RANK * ranks[1])).all())


def _close(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, list | tuple | np.ndarray) and isinstance(other, list | tuple | np.ndarray):
        return len(one) == len(other) and all(
            _close(*pair, tolerance) for pair in zip(one, other, strict=True)
        )
    if _missing(one) or _missing(other):
        return _missing(one) and _missing(other)
    if isinstance(one, float | np.floating) and isinstance(other, float | np.floating):
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
    return bool(one == other)


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
