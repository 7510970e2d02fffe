"""Modules that only some figures need."""

from __future__ import annotations

import importlib
from typing import Any

from patchscope_nn.errors import InputError


def optional(module: str, *, what: str, extra: str) -> Any:
    """Import a module that only `what` needs, when it is needed.

    Raises:
        InputError: Its package, which the extra installs, is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"{what} need {package}, which is not installed.", hint=f"pip install 'patchscope-nn[{extra}]'"
        ) from error
