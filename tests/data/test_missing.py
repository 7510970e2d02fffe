"""A value that is missing is never used as text: it is refused, or its row is left out and counted."""

from __future__ import annotations

import decimal
import json
import logging

import numpy as np
import pandas as pd
import pytest

import patchscope_nn as ps
from patchscope_nn import cli
from patchscope_nn._util.plain import is_missing
from patchscope_nn.errors import DataError
from patchscope_nn.metrics.values import contains
from patchscope_nn.recipe import lint, load_recipe

NAN = float("nan")
MISSING = [None, NAN, np.nan, np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), decimal.Decimal("NaN")]
WAY_ON = (
    "Give it a value; or take other rows, with data.where, or with data.drop_missing: true, which leaves out "
    "rows in which a used column is missing."
)


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_what_is_missing(value):
    assert is_missing(value)


@pytest.mark.parametrize(
    "value", ["", "nan", 0, False, [], [NAN], np.array([1.0, NAN]), {"a": None}], ids=repr
)
def test_what_is_not_missing(value):
    assert not is_missing(value)


def scope(**changes):
    fields = {"source": ps.Source(prompt="The Eiffel Tower", layer=1), "target": ps.Target(prompt="The city")}
    return ps.Patchscope(**fields | changes)


#: A Patchscope and options of `run` that use the column `a` -> the field that does.
USES = {
    "source.prompt": ({"source": ps.Source(prompt="The {a}")}, {}),
    "source.minus": ({"source": ps.Source(prompt="The city", minus="The {a}")}, {}),
    "source.position": ({"source": ps.Source(prompt="The city", position="{a}")}, {}),
    "source.mean.rows": ({"source": ps.Source(prompt="The city", mean={"rows": "a"})}, {}),
    "source.vector.index": (
        {"source": ps.Source(vector={"file": "builtin:directions", "index": "{a}"})},
        {},
    ),
    "target.prompt": ({"target": ps.Target(prompt="{a} city")}, {}),
    "target.prompts.1": ({"target": ps.Target(prompts=["The city", "{a}"])}, {}),
    "target.position": ({"target": ps.Target(prompt="The city", position={"tokens": "{a}"})}, {}),
    "target.corrupt.position": (
        {"target": ps.Target(prompt="The city", corrupt={"position": "{a}"})},
        {},
    ),
    "target.write.cut.position": (
        {"target": ps.Target(prompt="The city", write={"cut": {"position": "{a}"}})},
        {},
    ),
    "readout.next_token.reference.0": ({"readout": ps.NextToken(reference=[" {a}"])}, {}),
    "readout.choices.continuations.1": ({"readout": ps.Choices(["x", "{a}"])}, {}),
    "metrics.0.contains.reference": (
        {"readout": ps.Generate(max_new_tokens=1)},
        {"metrics": [{"contains": {"reference": "a"}}]},
    ),
}


@pytest.mark.parametrize("value", [None, NAN, pd.NA], ids=repr)
@pytest.mark.parametrize("field", USES)
def test_a_missing_value_is_refused_wherever_it_is_used(tiny_model, field, value):
    fields, options = USES[field]
    rows = [{"a": "Paris", "b": 1}, {"a": value, "b": 2}]
    with pytest.raises(DataError) as caught:
        ps.run(scope(**fields), model=tiny_model(), data=rows, **options)
    assert caught.value.message == (
        f"data.rows, row 2: the column 'a' is missing ({value!r}), and {field} uses it."
    )
    assert caught.value.hint == WAY_ON


def test_a_column_that_is_not_used_may_be_missing(tiny_model):
    rows = [{"a": "Paris", "b": None}, {"a": "city", "b": NAN}]
    run = ps.run(scope(source=ps.Source(prompt="The {a}", layer=1)), model=tiny_model(), data=rows)
    assert list(run.table()["source_prompt"]) == ["The Paris", "The city"]
    assert "n_dropped" not in run.manifest


RECIPE = """\
name: tiny
title: What comes next?
data: {file: rows.jsonl}
source: {prompt: "The {a}", layer: 1}
target: {prompt: "The city"}
"""


def written(folder, *, recipe=RECIPE, rows=("Paris", None, "city", NAN, "Tower")):
    lines = [json.dumps({"a": value, "b": None}) for value in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "tiny.yaml").write_text(recipe)
    return folder / "tiny.yaml"


def test_rows_are_left_out_on_demand_and_counted(tiny_model, tmp_path, caplog):
    file = written(tmp_path, recipe=RECIPE.replace("rows.jsonl", "rows.jsonl, drop_missing: true"))
    with caplog.at_level(logging.WARNING, "patchscope_nn"):
        run = ps.run(file, model=tiny_model(), out=tmp_path / "run")
    assert list(run.table()["source_prompt"]) == ["The Paris", "The city", "The Tower"]
    assert (run.manifest["n_rows"], run.manifest["n_dropped"]) == (3, 2)
    assert caplog.messages == ["2 data rows were dropped, because a column that is used has no value."]


def test_a_limit_counts_the_rows_that_are_kept(tiny_model, tmp_path):
    file = written(tmp_path, recipe=RECIPE.replace("rows.jsonl", "rows.jsonl, drop_missing: true"))
    run = ps.run(file, model=tiny_model(), limit=2)
    assert (run.manifest["n_rows"], run.manifest["n_dropped"]) == (2, 1)


def test_rows_beyond_the_limit_and_rows_that_where_leaves_out_are_not_looked_at(tiny_model, tmp_path):
    assert len(ps.run(written(tmp_path), model=tiny_model(), limit=1).rows) == 1
    chosen = written(tmp_path, recipe=RECIPE.replace("rows.jsonl", "rows.jsonl, where: {a: [Paris, city]}"))
    assert len(ps.run(chosen, model=tiny_model()).rows) == 2


def test_no_row_is_left(tiny_model, tmp_path):
    recipe = RECIPE.replace("rows.jsonl", "rows.jsonl, drop_missing: true")
    file = written(tmp_path, recipe=recipe, rows=(None, NAN))
    with pytest.raises(DataError) as caught:
        ps.run(file, model=tiny_model())
    assert caught.value.message == (
        "data.file='rows.jsonl': data.drop_missing leaves no row; all 2 lack a value of a used column (a)."
    )


METHODS = """\
methods:
  one: {}
  two: {target.prompt: "{b} city"}
"""


def test_methods_that_are_compared_have_the_same_rows(tiny_model, tmp_path):
    recipe = RECIPE.replace("rows.jsonl", "rows.jsonl, drop_missing: true")
    rows = [{"a": "Paris", "b": None}, {"a": None, "b": "The"}, {"a": "city", "b": "The"}]
    file = written(tmp_path, recipe=recipe + METHODS)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    experiment = ps.run(file, model=tiny_model())
    assert [list(run.table()["source_prompt"]) for run in experiment.values()] == [["The city"]] * 2


def test_an_empty_cell_of_a_csv_file_is_missing(tiny_model, tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\nParis,\n,x\n")
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("jsonl", "csv"))
    with pytest.raises(DataError, match=r"data.file='rows.csv', line 3: the column 'a' is missing \(None\)"):
        ps.run(tmp_path / "tiny.yaml", model=tiny_model())


def test_lint_finds_it_without_a_model(tmp_path):
    (problem,) = lint(written(tmp_path))
    assert (problem.field, problem.line) == ("data.file", 3)
    assert problem.message.startswith(
        "data.file='rows.jsonl', line 2: the column 'a' is missing (None), and source.prompt uses it. Give"
    )


def test_the_command_line_refuses_it_before_anything_runs(folder, tmp_path, monkeypatch, capsys):
    file = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["patchscope", "run", str(file), "--model", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "line 2: the column 'a' is missing (None)" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tuned_lens", {"column": "a"}),
        ("lre", {"prompt": "The {a} is in", "subject": "a", "subjects": 1}),
        (
            "trained_scale",
            {"source": ps.Source(prompt="The {a}"), "target": ps.Target(prompt="The city"), "text": " is"},
        ),
    ],
)
def test_a_fit_refuses_it_too(tiny_model, kind, options):
    rows = [{"a": "Paris is in the city"}, {"a": NAN}]
    with pytest.raises(DataError, match="the column 'a', which is missing here"):
        ps.fit(kind, model=tiny_model(), data=rows, **options)


def test_a_recipe_keeps_the_option_only_where_it_is_given(tmp_path):
    plain = load_recipe(written(tmp_path))
    assert plain.model_dump(mode="json")["data"] == {"file": "rows.jsonl"}
    dropping = load_recipe(written(tmp_path), sets=["data.drop_missing=true"])
    assert dropping.model_dump(mode="json")["data"] == {"file": "rows.jsonl", "drop_missing": True}


def test_a_reference_without_a_letter_is_contained_in_nothing():
    assert contains({"text": "anything"}, {"a": "?!"}, reference="a") is None
    assert contains({"text": "any thing"}, {"a": "Thing"}, reference="a") == 1.0
