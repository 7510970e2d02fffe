"""The registry of readout kinds, and their forms in recipes: `generate`, or `{generate: fields}`.

The builtin kinds are in `patchscope_nn.readouts`, which imports from this package. That module is imported by
name when a kind is first looked up. Kinds of installed packages are found by their entry points.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import PlainSerializer, PlainValidator, TypeAdapter, WithJsonSchema

from patchscope_nn._util.checking import NAMED
from patchscope_nn._util.plain import shown
from patchscope_nn._util.registry import Registry
from patchscope_nn.errors import InputError
from patchscope_nn.spec.readout import Readout

_SHIPPED = "patchscope_nn.readouts"
_DEFAULT = "next_token"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_KINDS: dict[str, type[Readout]] = {}
_Kind = TypeVar("_Kind", bound=type[Readout])


def register_readout(kind: _Kind) -> _Kind:
    """Register a kind of readout under its name; a class decorator.

    A class that is defined again, as in a notebook, replaces the earlier class.

    Raises:
        InputError: Its name or one of its columns is taken, or a required attribute is missing.
    """
    _shipped()
    if not _is_kind(kind):
        raise InputError(
            f"{shown(kind)} is not a kind of readout.", hint="Give a subclass of patchscope_nn.Readout."
        )
    missing = [attribute for attribute in ("name", "body", "columns") if not hasattr(kind, attribute)]
    if missing:
        raise InputError(
            f"the readout {kind.__name__} does not define {' and '.join(missing)}.",
            hint="Set name, body and columns on the class; see patchscope_nn.spec.Readout.",
        )
    if not _NAME.fullmatch(kind.name):
        raise InputError(
            f"the readout {kind.__name__} is named {kind.name!r}.",
            hint="Use lower-case letters, digits and underscores: max_logit.",
        )
    if ":" not in kind.body:
        raise InputError(
            f"the body of the readout {kind.name} is {kind.body!r}.",
            hint="Write module:function, for example body = f'{__name__}:read_max_logit'.",
        )
    known = _KINDS.get(kind.name, NAMED.get(kind.name))
    if known is not None and _path(known) != _path(kind):
        raise InputError(
            f"the name {kind.name!r} is taken by {_path(known)}.",
            hint=f"Give the readout {_path(kind)} another name.",
        )
    _check_columns(kind)
    _KINDS[kind.name] = NAMED[kind.name] = kind
    return kind


def _check_columns(kind: type[Readout]) -> None:
    first = next(iter(kind.columns), None)
    if first is None:
        raise InputError(f"the readout {kind.name} has no columns.", hint="Name at least one.")
    for other in _KINDS.values():
        if other.name == kind.name:
            continue
        shared = [name for name in kind.columns if name in other.columns]
        if first in shared or next(iter(other.columns)) in shared:
            raise InputError(
                f"the readouts {kind.name} and {other.name} share the column {shared[0]!r}.",
                hint="The first column identifies the tables of a kind; give it another name.",
            )
        for name in shared:
            if kind.columns[name] != other.columns[name]:
                raise InputError(
                    f"the column {name!r} holds {kind.columns[name]} in the readout {kind.name} and "
                    f"{other.columns[name]} in {other.name}.",
                    hint="Give it another name.",
                )


def _is_kind(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Readout)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _adopt(name: str, loaded: Any) -> type[Readout]:
    """Check and register the class that an entry point names."""
    if not _is_kind(loaded):
        raise InputError("it is not a subclass of patchscope_nn.Readout.")
    if loaded.name != name:
        raise InputError(f"the entry point is named {name!r}, and the readout {loaded.name!r}.")
    kind: type[Readout] = register_readout(loaded)
    return kind


#: All kinds. When they are listed, a kind whose package cannot be loaded is left out.
READOUTS: Registry[type[Readout]] = Registry(
    "patchscope_nn.readouts", noun="readout", entries=_KINDS, adopt=_adopt
)


def readout_kinds() -> Mapping[str, type[Readout]]:
    """Return every kind by its name: builtin kinds, those of installed packages, and registered ones."""
    _shipped()
    return dict(READOUTS.load_all())


def default_readout() -> Readout:
    """Return the readout that a Patchscope has by default."""
    _shipped()
    return _KINDS[_DEFAULT]()


@functools.cache
def _shipped() -> None:
    importlib.import_module(_SHIPPED)


@functools.cache
def _form(kind: type[Readout]) -> TypeAdapter[dict[str, Readout]]:
    """Return a validator of `{name: fields}`, whose errors include the kind's name in the path."""
    return TypeAdapter(dict[str, kind])  # type: ignore[valid-type]  # a class that is known at run time


def _parse(value: Any) -> Readout:
    if isinstance(value, Readout):
        if type(value) is not _KINDS.get(value.name):
            register_readout(type(value))
        return value
    if isinstance(value, str):
        value = {value: {}}
    if isinstance(value, Mapping) and len(value) == 1:
        name, fields = next(iter(value.items()))
        _shipped()
        kind = READOUTS.find(str(name))
        return _form(kind).validate_python({name: {} if fields is None else fields})[name]
    raise ValueError(
        f"{value!r} is not a readout; give one of {', '.join(readout_kinds())}, for example generate: {{}}"
    )


def dump_readout(readout: Readout, *, exclude_defaults: bool = False) -> dict[str, Any]:
    """Convert a readout to its YAML form, `{name: fields}`."""
    return {readout.name: readout.model_dump(mode="json", exclude_defaults=exclude_defaults)}


#: The type of `Patchscope.readout`. `recipe.schema` adds the form of each kind to the JSON Schema.
AnyReadout = Annotated[Readout, PlainValidator(_parse), PlainSerializer(dump_readout), WithJsonSchema({})]


def kinds_in(columns: Any) -> list[type[Readout]]:
    """List the kinds whose columns a table has, in the order of `readout_kinds`."""
    return [kind for kind in readout_kinds().values() if (kind.says or next(iter(kind.columns))) in columns]
