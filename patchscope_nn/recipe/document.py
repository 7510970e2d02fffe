"""YAML with line numbers: the content of a recipe file, the line of each field, and the file's problems.

Scalars are read by the rules of YAML 1.2 and of editors, not of YAML 1.1: `5:10` is a text, not a number in
base 60; `yes` and `no` are texts; dates are texts. Every number by these rules is also a number in YAML 1.1,
so files of other tools are read correctly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from patchscope_nn._util.plain import wrong_text
from patchscope_nn.errors import Problem

try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]  # the same interface

_TAG = "tag:yaml.org,2002:"
_KEY_TAGS = (f"{_TAG}str", f"{_TAG}merge")
_FLOAT = (
    r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}


class _Loader(_SafeLoader):
    """The safe loader, restricted to the scalars above and to the types of JSON."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's interface)
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in _SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
    }


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A YAML file, read as far as possible.

    Attributes:
        root: Its node tree, with line numbers; None if the file is empty or cannot be read.
        value: Its content, as mappings, lists and scalars.
        problems: Its problems as a YAML file.
    """

    root: yaml.Node | None
    value: Any
    problems: tuple[Problem, ...]

    def line(self, field: str) -> int:
        """Return the line of a field, from 1, or of the nearest field above it that is in the file."""
        node, line = self.root, 1
        if node is not None:
            line = node.start_mark.line + 1
        parts = field.split(".") if field else []
        while parts and node is not None:
            step = _step(node, parts)
            if step is None:
                break
            line, node, parts = step
        return line


def _step(node: yaml.Node, parts: list[str]) -> tuple[int, yaml.Node, list[str]] | None:
    """Go down one level; return the line, the node and the rest of the path, or None if the path ends."""
    if isinstance(node, yaml.SequenceNode):
        if parts[0].isdecimal() and int(parts[0]) < len(node.value):
            item = node.value[int(parts[0])]
            return item.start_mark.line + 1, item, parts[1:]
    elif isinstance(node, yaml.MappingNode):
        # A key may contain dots; the longest key that fits is taken. Of a repeated key the last is taken.
        for count in range(len(parts), 0, -1):
            name = ".".join(parts[:count])
            for key, item in reversed(node.value):
                if isinstance(key, yaml.ScalarNode) and key.value == name:
                    return key.start_mark.line + 1, item, parts[count:]
    return None


def read_yaml(text: str) -> Document:
    """Read a YAML text. Its problems are returned, never raised.

    Args:
        text: The text, without a byte order mark.

    Returns:
        The document, with its problems.
    """
    if problem := wrong_text(text):
        return _unreadable(f"is not text: {problem}")
    try:
        return _build(_Loader(text))
    except yaml.YAMLError as error:
        return _syntax(error, text)
    except (ValueError, KeyError) as error:
        return _unreadable(f"contains a scalar that does not fit its tag: {error}")
    except RecursionError:
        return _unreadable("is nested too deeply")


def _build(loader: _Loader) -> Document:
    try:
        root = loader.get_single_node()
        if root is None:
            return Document(root=None, value=None, problems=())
        problems = tuple(_check(root, "", set()))
        if any(_is_fatal(problem) for problem in problems):
            return Document(root=root, value=None, problems=problems)
        # With `deep`, an alias that contains itself is refused.
        return Document(root=root, value=loader.construct_object(root, deep=True), problems=problems)
    finally:
        loader.dispose()


_BAD_KEY = "a key must be a text; put it in quotes, for example"


def _is_fatal(problem: Problem) -> bool:
    return problem.message.startswith(_BAD_KEY)


def _check(node: yaml.Node, path: str, seen: set[int]) -> Iterator[Problem]:
    """Find repeated keys, which YAML forbids and PyYAML accepts, and keys that are not texts."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _check(item, f"{path}.{number}".lstrip("."), seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, item in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            yield Problem(field=path, message=f'{_BAD_KEY} "{{entity}}" for a text with braces', line=line)
            continue
        field = f"{path}.{key.value}".lstrip(".")
        if key.tag not in _KEY_TAGS:
            yield Problem(field=path, message=f'{_BAD_KEY} "{key.value}"', line=line)
        if key.value in lines:
            message = f"is given twice, first on line {lines[key.value]}; keep one"
            yield Problem(field=field, message=message, line=line)
        lines.setdefault(key.value, line)
        yield from _check(item, field, seen)


def _syntax(error: yaml.YAMLError, text: str) -> Document:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        line = mark.line + 1
    else:  # a character that YAML does not allow; the error has its position, not its line
        before = text.encode()[: getattr(error, "position", 0)]
        line = before.count(b"\n") + 1
    reason = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    if reason.startswith("but "):  # the sentence begins in the context
        reason = f"{getattr(error, 'context', '')} {reason}"
    hint = " Check the indentation, and quote texts that hold ': ' or begin with a mark."
    is_form = not isinstance(error, yaml.constructor.ConstructorError)
    return _unreadable(f"cannot be read as YAML: {reason}.{hint * is_form}", line=line)


def _unreadable(message: str, *, line: int = 1) -> Document:
    return Document(root=None, value=None, problems=(Problem(field="", message=message, line=line),))
