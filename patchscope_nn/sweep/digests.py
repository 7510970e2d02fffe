"""Digests of what cells are, as numbers that can be combined for many cells at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np


def digests(contents: Iterable[object], common: Any = None) -> Any:
    """Return a digest of 64 bits of each content, as unsigned numbers."""
    numbers = []
    for content in contents:
        digest = hashlib.sha256() if common is None else common.copy()
        digest.update(repr(content).encode())
        numbers.append(int.from_bytes(digest.digest()[:8]))
    return np.array(numbers, np.uint64)


def mix(numbers: Any) -> Any:
    """Scramble unsigned numbers of 64 bits, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
