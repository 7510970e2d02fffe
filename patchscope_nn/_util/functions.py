"""Users' functions: importing them by name, naming them, and identifying them by what their code does."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any

_REFERENCE = re.compile(r"[^:\s]+:[^:\s]+")


def check_reference(text: str) -> str:
    """Check that a text has the form `module:name`, without importing anything.

    Raises:
        ValueError: The text has another form.
    """
    if not _REFERENCE.fullmatch(text):
        raise ValueError(f"function: {text!r} should be module:name, for example my_code:my_function")
    return text


def import_function(reference: str) -> Any:
    """Import the object that `module:name` names.

    Args:
        reference: The module, a colon, and the name of a function or object in it.

    Returns:
        The object.

    Raises:
        ValueError: The module cannot be imported, or does not define the name.
    """
    module, name = check_reference(reference).split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        # A user's module may raise anything while it is imported.
        raise ValueError(f"{reference!r} cannot be imported: {error}") from error


def reference_of(function: Any) -> str:
    """Return `module:name` of a function, or of the class of a callable object."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def name_in(reference: str) -> str:
    """Return the last part of the name in `module:name`."""
    return reference.rpartition(":")[2].rpartition(".")[2]


def name_of(function: Any) -> str:
    """Return the name of a function, or of the class of a callable object."""
    return str(getattr(function, "__name__", type(function).__name__))


def function_bytes(function: Any) -> bytes:
    """Return bytes that identify what a function computes, equal in every process.

    They hold its bytecode, constants, defaults and closure, and those of the functions of its own module that
    it calls. Code of other modules is left out.

    Args:
        function: A function. Another callable is identified by its name only.
    """
    return b"".join(_parts(function, seen=set()))


def _parts(function: Any, *, seen: set[str]) -> Iterable[bytes]:
    if not isinstance(function, FunctionType):
        yield reference_of(function).encode()
        return
    closed = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    for part in (function.__code__, *closed, *defaults):
        yield value_bytes(part)
    for name in _names(function.__code__):
        other = function.__globals__.get(name)
        if isinstance(other, FunctionType) and other.__module__ == function.__module__ and name not in seen:
            seen.add(name)
            yield from _parts(other, seen=seen)
        elif not isinstance(other, FunctionType):
            yield value_bytes(other)


def _names(code: CodeType) -> list[str]:
    """List the names that a code object looks up, including those of its inner functions."""
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part)]
    return [*code.co_names, *inner]


def value_bytes(value: Any) -> bytes:
    """Return bytes that identify a value, equal in every process; empty for an object without such bytes."""
    if hasattr(type(value), "detach"):  # a tensor; torch is not imported here
        return bytes(value.detach().float().cpu().contiguous().numpy().tobytes())
    if isinstance(value, CodeType):
        return value.co_code + repr(value.co_names).encode() + b"".join(map(value_bytes, value.co_consts))
    if isinstance(value, tuple | list):
        return b"".join(map(value_bytes, value))
    if isinstance(value, set | frozenset):
        return b"".join(sorted(map(value_bytes, value)))
    return repr(value).encode() if isinstance(value, int | float | str | bytes | None) else b""
