"""What a body is given: a step of a plan as plain values, which is all that may enter a context."""

from __future__ import annotations

from typing import Any

Work = dict[str, Any]
