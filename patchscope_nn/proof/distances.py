"""The distance of two readouts of a cell, which were computed in different ways."""

from __future__ import annotations

import math
from typing import Any

import torch


def readout_distance(expected: dict[str, Any], observed: dict[str, Any]) -> float:
    """Return the distance of two readouts of a cell: in nats, for states in standard deviations."""
    if "top_ids" in expected:
        # The lower half of the top tokens is ignored: tokens that are nearly as likely may replace them.
        half = len(observed["top_ids"]) // 2
        known = dict(zip(expected["top_ids"], expected["top_probs"], strict=True))
        probs = [known.get(token, 0.0) for token in observed["top_ids"][:half]]
        return _apart(probs, observed["top_probs"][:half], logs=True)
    if "token_ids" in expected:
        pairs = enumerate(zip(expected["token_ids"], observed["token_ids"], strict=False))
        same = next((n for n, (first, second) in pairs if first != second), len(expected["token_ids"]))
        # If two tokens are nearly as likely, either may be decoded, and the texts differ from there on.
        return _apart(expected["token_probs"][: same + 1], observed["token_probs"][: same + 1], logs=True)
    if "choice_logprobs" in expected:
        return _apart(expected["choice_logprobs"], observed["choice_logprobs"], logs=False)
    scale = float(torch.tensor(expected["hidden"]).std())
    return _apart(expected["hidden"], observed["hidden"], logs=False) / scale


def _apart(expected: Any, observed: Any, *, logs: bool) -> float:
    """Return the largest difference of two lists of numbers, or their logarithms; infinite if undefined."""
    first, second = (torch.tensor(values, dtype=torch.float64).flatten() for values in (expected, observed))
    if first.shape != second.shape:
        return float("inf")
    first, second = (first.log(), second.log()) if logs else (first, second)
    difference = (first - second).masked_fill(first == second, 0).abs()  # equal infinities differ by 0
    largest = float(difference.amax()) if len(difference) else 0.0
    return largest if math.isfinite(largest) else math.inf
