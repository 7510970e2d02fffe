"""Checks that a kind of readout fulfils its contract (`spec.Readout`); for users' kinds too."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from patchscope_nn.analysis.tables import write_parquet
from patchscope_nn.errors import SpecError
from patchscope_nn.models import Model
from patchscope_nn.plan import Optimisations
from patchscope_nn.proof.hooks import Hooks, Place, Write
from patchscope_nn.recipe import Recipe, dump, json_schema, resolved
from patchscope_nn.runs.results import Run
from patchscope_nn.runs.run import run
from patchscope_nn.spec import Patchscope, Readout, Source, Target
from patchscope_nn.spec.encoding import encode

#: Source and target prompts of several lengths, so that rows are padded if they are not packed.
_PROMPTS = (
    {"s": "The Eiffel Tower is in the city of", "t": "The city of Paris is x, the city"},
    {"s": "Diana is in the city", "t": "The city x is"},
    {"s": "The Tower", "t": "The city of the Tower is in Paris x, in"},
)
_POSITION = -2
#: Runs with these options must have the same table as a run with all optimisations.
_WAYS: dict[str, dict[str, Any]] = {
    "no optimisation": {"optimisations": Optimisations.none()},
    "two cells a pass": {"max_rows": 2},
    "the rehearsal of a server": {"remote": "local"},
}
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class HookedCell:
    """One cell, run by plain PyTorch hooks.

    Attributes:
        row: The data row.
        ids: The token ids of the target prompt T.
        logits: `logits(more)`: (len(more) + 1, vocab), the logits of the patched run after T, and after each
            of the token ids `more` that follow T.
        unpatched: The same without the patch.
        written: (d_model,) the state that is written.
        replaced: (d_model,) the state that it replaces.
        source_logits: (vocab,) the source model's logits at the position that is read.
    """

    row: Mapping[str, Any]
    ids: tuple[int, ...]
    logits: Callable[[Sequence[int]], torch.Tensor]
    unpatched: Callable[[Sequence[int]], torch.Tensor]
    written: torch.Tensor
    replaced: torch.Tensor
    source_logits: torch.Tensor


def check_readout(
    example: Readout,
    *,
    model: Model,
    expected: Callable[[HookedCell], Mapping[str, Any]] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> None:
    """Check that a kind of readout fulfils its contract.

    The example is written to YAML and read back, and looked up in the JSON Schema. Then it runs with every
    optimisation, with none, in small passes, in one forward pass with its source, and as a rehearsal of a
    server; all tables must be the same. With `expected`, the table is also compared with plain PyTorch hooks.

    Args:
        example: A readout of the kind.
        model: A model with a few blocks.
        expected: Computes some of a cell's columns from its values under plain hooks.
        columns: Data columns that the example's texts use.

    Raises:
        AssertionError: The kind does not fulfil its contract; the message says where.
    """
    _check_documents(example)
    rows = [{**row, **(columns or {})} for row in _PROMPTS]
    whole = _run(example, model, rows)
    _check_table(example, whole)
    for name, options in _WAYS.items():
        _check_same(example, whole, _run(example, model, rows, **options), name)
    alone = _run(example, model, rows[:1], layers=(0,), context="session")
    _check_same(example, alone, _run(example, model, rows[:1], layers=(0,)), "one forward with the source")
    if expected is not None:
        hooks = Hooks(model)
        for row in whole.rows:
            if row["control"] is None:
                cell = _hooked(hooks, model, row, rows[row["row"]])
                for name, value in expected(cell).items():
                    _require(_same(row[name], value), f"{name} is {row[name]}, with plain hooks {value}")


def _check_documents(example: Readout) -> None:
    """Check that the kind can be parsed and dumped, is in the JSON Schema, and is listed in messages."""
    recipe = Recipe(name="conformance", source=Source(prompt="x"), readout=example)
    for plain in (dump(recipe), resolved(recipe)):
        again = Recipe(**yaml.safe_load(yaml.safe_dump(plain)))
        _require(again == recipe, f"{plain['readout']} is read back as {again.readout!r}")
    kind = type(example)
    schema = json_schema()["$defs"].get(kind.__name__, {})
    _require(bool(schema.get("description")), "the JSON Schema does not describe it; give it a docstring")
    for field, form in schema["properties"].items():
        _require("description" in form, f"the field {field} has no docstring under it")
    fields = {**example.model_dump(mode="json"), "no_such_field": 1}
    _require(
        f"readout.{example.name}.no_such_field" in _refusal({example.name: fields}), "unknown fields pass"
    )
    _require(example.name in _refusal("no-such-readout"), "messages do not list it")


def _refusal(readout: Any) -> str:
    try:
        Patchscope(source=Source(prompt="x"), readout=readout)
    except SpecError as error:
        return str(error)
    return ""


def _run(
    example: Readout,
    model: Model,
    rows: Sequence[Mapping[str, Any]],
    *,
    layers: tuple[int, ...] = (0, -1),
    **options: Any,
) -> Run:
    scope = Patchscope(
        source=Source(prompt="{s}", layer=layers),
        target=Target(prompt="{t}", position=_POSITION),
        readout=example,
    )
    return run(scope, model=model, data=rows, controls=["unpatched", "random"], **options)


def _check_table(example: Readout, whole: Run) -> None:
    errors = [row["error"] for row in whole.rows if row["error"] is not None]
    _require(not errors, f"{len(errors)} of {len(whole.rows)} cells have no result: {errors[:1]}")
    names = list(whole.table().columns)
    start = names.index(example.given[0]) if example.given[0] in names else 0
    actual = tuple(names[start : start + len(example.given)])
    _require(actual == example.given, f"the table has the columns {actual}, not {example.given}")
    _require(set(example.given) <= set(example.columns), "it returns a column that is not in `columns`")
    for row in whole.rows:
        _require(set(example.given) <= set(row), f"a row lacks {set(example.given) - set(row)}")
    with tempfile.TemporaryDirectory() as folder:  # raises if a value is not of its column's type
        write_parquet(whole.rows, names, Path(folder) / "cells.parquet")


def _check_same(example: Readout, whole: Run, other: Run, way: str) -> None:
    for row, again in zip(whole.rows, other.rows, strict=True):
        for name in example.given:
            _require(
                _same(row[name], again[name]),
                f"{name} differs with {way}: {row[name]} and {again[name]}. Does its body mix rows?",
            )


def _same(first: Any, second: Any) -> bool:
    """Compare two values, with a tolerance for floats."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(first == second)


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 (as in an assert)
    if not holds:
        raise AssertionError(message)


def _hooked(hooks: Hooks, model: Model, row: Mapping[str, Any], data: Mapping[str, Any]) -> HookedCell:
    source, ids = (
        encode(row[f"{side}_prompt"], model.tokenizer, field=side).ids for side in ("source", "target")
    )
    read, written = Place(row["source_layer"]), Place(row["target_layer"])
    (at,), (position,) = row["source_position"], row["target_position"]
    write = Write(written, position, hooks.read(source, [read])[read][at])
    return HookedCell(
        row=data,
        ids=ids,
        logits=lambda more: hooks.continued(ids, more, write),
        unpatched=lambda more: hooks.continued(ids, more, None),
        written=write.state,
        replaced=hooks.read(ids, [written])[written][position],
        source_logits=hooks.logits(source, [None])[0, at],
    )
