"""A recipe as YAML and as Python, ready to run, to reproduce what the page shows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchscope_nn._util.yaml_text import yaml_text
from patchscope_nn.backends import Places
from patchscope_nn.recipe import Recipe, dump
from patchscope_nn.spec import dump_mapping

#: The columns, before the answer, that the copied script prints of a grid and of a cell.
_GRID_COLUMNS = ("source_position", "source_token", "source_layer")
_CELL_COLUMNS = ("control", "source_layer", "target_layer")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how models run: options of `run` and `load` that are not part of a recipe."""

    remote: bool | str = False
    source_remote: bool | str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    engine: str | None = None
    source_engine: str | None = None
    engine_args: Mapping[str, Any] | None = None

    def places(self) -> Places:
        """Return where M and M* run; InputError if an option does not name a place."""
        return Places.of(**vars(self))

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from their default, by name."""
        return {name: value for name, value in vars(self).items() if value != getattr(Options, name)}

    def arguments(self) -> list[str]:
        """Return the options that differ from their default as command-line arguments."""
        spelling: dict[Any, str] = {True: "ndif", False: "no"}
        arguments: list[str] = []
        for name, value in self.changed().items():
            values = [f"{key}={part}" for key, part in value.items()] if name == "engine_args" else [value]
            for each in values:
                arguments += [f"--{name.replace('_', '-')}", str(spelling.get(each, each))]
        return arguments


def as_yaml(recipe: Recipe, options: Options) -> str:
    """Write a recipe as a file, with comments that say how to run it."""
    command = shlex.join(["patchscope", "run", f"{recipe.name}.yaml", *options.arguments()])
    header = f"# From `patchscope explore`. Save as {recipe.name}.yaml, then:\n#   {command}\n"
    return header + yaml_text(dump(recipe))


def as_python(recipe: Recipe, options: Options) -> str:
    """Write a recipe as a script that prints what the page shows.

    Texts are written with `repr`, which escapes invisible characters such as direction marks.
    """
    readout = recipe.readout
    parts = {
        "source": _call(recipe.source),
        "target": _call(recipe.target),
        "mapping": repr(dump_mapping(recipe.mapping)),
        "readout": _call(readout),
    }
    inner = "".join(f"        {name}={value},\n" for name, value in parts.items())
    arguments = {"model": recipe.model, "controls": tuple(recipe.controls), **options.changed()}
    if recipe.target.model is not None:  # `model` would set both models
        arguments = {"source_model": arguments.pop("model"), **arguments}
    columns = [*(_CELL_COLUMNS if recipe.controls else _GRID_COLUMNS), *(readout.odds or (readout.says,))]
    outer = "".join(f"    {name}={value!r},\n" for name, value in arguments.items() if value != ())
    return (
        "# From `patchscope explore`.\nimport patchscope_nn as ps\n\n"
        f"run = ps.run(\n    ps.Patchscope(\n{inner}    ),\n{outer})\n"
        f"print(run.table()[{columns!r}].to_string())\n"
    )


def _call(spec: Any) -> str:
    """Write a part of a Patchscope as a call, indented for its place in the script."""
    name, fields = type(spec).__name__, spec.model_dump(mode="json", exclude_defaults=True)
    lines = "".join(f"            {field}={value!r},\n" for field, value in fields.items())
    return f"ps.{name}(\n{lines}        )" if fields else f"ps.{name}()"
