"""A recipe as YAML and as Python: both give again what the page shows, and run as they are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from patchscope_nn.backends import Places
from patchscope_nn.recipe import Recipe, dump
from patchscope_nn.spec import dump_mapping

_WIDTH = 100
#: Where the cells of a grid are, and those of one state beside its controls.
_OF_GRID, _OF_CELL = (
    ("source_position", "source_token", "source_layer"),
    ("control", "source_layer", "target_layer"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the explorer runs what it is asked: the options that a recipe does not hold, as Python has them.

    Attributes:
        remote: As in `run`.
        source_remote: As in `run`.
        dtype: As in `load`.
        device_map: As in `load`.
    """

    remote: bool | str = False
    source_remote: bool | str | None = None
    dtype: str = "auto"
    device_map: str | None = None

    def places(self) -> Places:
        """Where M and M* run.

        Raises:
            InputError: An option names no place.
        """
        return Places.of(**vars(self))

    def given(self) -> dict[str, Any]:
        """Those that are not the default, by name."""
        return {name: value for name, value in vars(self).items() if value != getattr(Options, name)}

    def words(self) -> list[str]:
        """The same for the command line."""
        spelt = {True: "ndif", False: "no"}
        return [
            word
            for name, value in self.given().items()
            for word in (f"--{name.replace('_', '-')}", str(spelt.get(value, value)))
        ]


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines with its escapes, as the recipes that ship do."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if "\n" in text else None
    ),
)


def as_yaml(recipe: Recipe, options: Options) -> str:
    """The recipe as a file, whose first lines say how to run it."""
    command = shlex.join(["patchscope", "run", f"{recipe.name}.yaml", *options.words()])
    body = yaml.dump(dump(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return f"# From `patchscope explore`. Save as {recipe.name}.yaml, then:\n#   {command}\n{body}"


def as_python(recipe: Recipe, options: Options) -> str:
    """The recipe as a script, which prints what the page shows.

    Texts are written by `repr`: what cannot be seen, such as a mark that turns the direction of writing,
    is an escape there.
    """
    readout = recipe.readout
    parts = {
        "source": _call("Source", _fields(recipe.source), indent=8),
        "target": _call("Target", _fields(recipe.target), indent=8),
        "mapping": repr(dump_mapping(recipe.mapping)),
        "readout": _call(type(readout).__name__, _fields(readout), indent=8),
    }
    inner = "".join(f"        {name}={value},\n" for name, value in parts.items())
    given = {"model": recipe.model, "controls": tuple(recipe.controls), **options.given()}
    if recipe.target.model is not None:  # `model` stands for both
        given = {"source_model": given.pop("model"), **given}
    shown = [*(_OF_CELL if recipe.controls else _OF_GRID), *(readout.odds or (readout.says,))]
    outer = "".join(f"    {name}={value!r},\n" for name, value in given.items() if value != ())
    return (
        "# From `patchscope explore`.\nimport patchscope_nn as ps\n\n"
        f"run = ps.run(\n    ps.Patchscope(\n{inner}    ),\n{outer})\n"
        f"print(run.table()[{shown!r}].to_string())\n"
    )


def _fields(spec: Any) -> Mapping[str, Any]:
    return dict(spec.model_dump(mode="json", exclude_defaults=True))


def _call(name: str, fields: Mapping[str, Any], *, indent: int) -> str:
    if not fields:
        return f"ps.{name}()"
    pad = " " * indent
    lines = "".join(f"{pad}    {field}={value!r},\n" for field, value in fields.items())
    return f"ps.{name}(\n{lines}{pad})"
