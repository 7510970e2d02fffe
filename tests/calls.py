"""Counts calls of the package's functions, for tests of work that must not grow with the cells."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import patchscope_nn as ps

PACKAGE = str(Path(ps.__file__).parent)


def calls(run: Any) -> int:
    """How often functions of the package are called, comprehensions and generators included."""
    count = 0

    def profile(frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count
