"""Digests of values, which tell one run, fit or proof from another."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any, *, length: int = 16) -> str:
    """Hex digest of a value's JSON; keys are sorted, and what JSON does not know is written as text.

    Args:
        value: Numbers, texts, lists and mappings.
        length: How many hex digits of the SHA-256.
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
