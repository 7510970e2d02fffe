"""Digests of values, which identify runs, fits and proofs."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any, *, length: int = 16) -> str:
    """Return a hex digest of a value's JSON. Keys are sorted, and values that JSON lacks become texts.

    Args:
        value: Numbers, texts, lists and mappings.
        length: The number of hex digits of the SHA-256 to keep.
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
