"""The arguments of public functions, checked against their annotations before anything runs."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, Union, Unpack, cast, get_args, get_origin, get_type_hints

from patchscope_nn._util.plain import plain, shown, wrong_text
from patchscope_nn.errors import Problem, SpecError

# A ParamSpec cannot be serialised by value, as this module is when a user's class that names it travels.
_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


_PACKED = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def checked(function: _F) -> _F:
    """Make a function check its arguments against their annotations.

    Numbers of numpy, torch and pandas are converted if the annotation asks for Python's own numbers.

    Args:
        function: The function. Its `**options` are checked if their annotation is an unpacked TypedDict;
            otherwise the function they are passed on to checks them.

    Returns:
        The function. It raises a `SpecError` that lists every argument of a wrong type.
    """
    signature = inspect.signature(function)
    # The return annotation may be a type that only type checkers import.
    annotations = {name: hint for name, hint in function.__annotations__.items() if name != "return"}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        hints: dict[str, Any] = {}
        # Resolved in each call: hints kept on a method would travel with its class to servers.
        with suppress(NameError):  # on a server, the names in annotations are missing
            hints = get_type_hints(SimpleNamespace(__annotations__=annotations), function.__globals__)
        wrong = []
        for arguments, of_arguments in _scopes(signature, bound.arguments, hints):
            for name, argument in arguments.items():
                hint = of_arguments.get(name, Any)
                value, fits = argument, _fits(argument, hint)
                if not fits and not isinstance(argument, str):
                    arguments[name] = value = plain(argument)
                    fits = _fits(value, hint)
                if problem := _problem(value, hint, fits=fits):
                    wrong.append(Problem(field=name, message=problem))
        if wrong:
            raise SpecError(wrong, origin=function.__qualname__.removesuffix(".__init__"))
        return function(*bound.args, **bound.kwargs)

    return cast("_F", call)


def _scopes(
    signature: inspect.Signature, arguments: dict[str, Any], hints: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the arguments by name with their types: first those of the signature, then `**options`."""
    packed = {name for name, parameter in signature.parameters.items() if parameter.kind in _PACKED}
    yield arguments, {name: hint for name, hint in hints.items() if name not in packed}
    for name in packed:
        if get_origin(hints.get(name)) is Unpack and name in arguments:
            yield arguments[name], get_type_hints(get_args(hints[name])[0])


def checked_class(kind: type[_T]) -> type[_T]:
    """Make a class check the arguments of its constructor and of its own public methods.

    `forward` is not checked, because it runs inside traces and on servers.
    """
    for name, member in list(vars(kind).items()):
        if (name.startswith("_") and name != "__init__") or name == "forward":
            continue
        if isinstance(member, classmethod):
            setattr(kind, name, classmethod(checked(member.__func__)))
        elif inspect.isfunction(member):
            setattr(kind, name, checked(member))
    return kind


def _problem(value: Any, hint: Any, *, fits: bool) -> str:
    """Describe what is wrong with an argument; empty if it is valid. A path need not be valid Unicode."""
    if not fits:
        return f"should be {_words(hint)}; given {shown(value)}"
    return wrong_text(value) if isinstance(value, str) and Path not in get_args(hint) else ""


def _fits(value: Any, hint: Any) -> bool:
    """True if a value has an annotated type. A boolean does not count as a number, nor a text as a list."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any or getattr(kind, "_is_protocol", False):
        return True
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    text = kind in (Sequence, Iterable) and isinstance(value, str | bytes)
    return isinstance(value, kind) and not text and (not parts or _holds(value, parts))


def _holds(value: Any, parts: tuple[Any, ...]) -> bool:
    """True if the items of a container have the annotated types."""
    if isinstance(value, dict) and len(parts) > 1:
        return _all_fit(value, parts[0]) and _all_fit(value.values(), parts[1])
    if not isinstance(value, list | tuple | set | dict):
        # Arrays are refused here and converted by `plain`. Other sequences may read each item from a file,
        # so their items are not checked.
        return not hasattr(value, "tolist")
    if isinstance(value, tuple) and len(parts) > 1 and parts[-1] is not ...:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return _all_fit(value, parts[0])


def _all_fit(values: Iterable[Any], hint: Any) -> bool:
    """True if every value has an annotated type. Comparing the set of types is fast for many rows."""
    return hint is Any or {*map(type, values)} <= {hint} or all(_fits(value, hint) for value in values)


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    Path: "a path",
    type(None): "None",
    Mapping: "a mapping",
    Sequence: "a list",
    Iterable: "a list",
    tuple: "a tuple",
    Callable: "a function",
}


def _words(hint: Any) -> str:
    """Describe an annotated type in words."""
    *first, last = _alternatives(hint)
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(hint: Any) -> list[str]:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return [words for part in parts for words in _alternatives(part)]
    if kind is Literal:
        return [repr(part) for part in parts]
    words = _WORDS.get(kind) or f"a {kind.__name__}"
    if kind not in (Sequence, Iterable, tuple) or Any in parts or not parts:
        return [words]
    return [f"{words} of {' and '.join(_words(part) for part in parts if part is not ...)}"]
