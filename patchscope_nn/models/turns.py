"""A lock for the whole process: only one thread at a time loads, traces or trains models.

nnsight keeps the state of a trace on the model, so two threads that trace the same model break each other's
runs. While transformers loads a model, it sets PyTorch's default dtype for all threads. There is only one
lock, because with several, two threads could each hold one and wait for the other's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

#: Held while a model is loaded, traced or trained. The thread that holds it may take it again.
TURN = threading.RLock()


def in_turn(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function wait until no other thread loads, traces or trains a model; a decorator."""

    @functools.wraps(function)
    def waiting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with TURN:
            return function(*args, **kwargs)

    return waiting
