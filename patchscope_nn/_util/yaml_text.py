"""YAML text in the style of the builtin recipes."""

from __future__ import annotations

import yaml


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines in double quotes; PyYAML's default doubles its line breaks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if "\n" in text else None
    ),
)


def yaml_text(value: object, *, allow_unicode: bool = True) -> str:
    """Write plain values as YAML, in their order.

    Args:
        value: Mappings, lists, texts, numbers, booleans and None.
        allow_unicode: Write characters outside ASCII literally, not as escapes.
    """
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, width=100))
