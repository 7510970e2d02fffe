"""A user's metrics and columns: how they are named, what they do to a run, and how they fail."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from one_cell import compute_metrics

import patchscope_nn as ps
from patchscope_nn.errors import FolderError, InputError, SpecError
from patchscope_nn.metrics import METRICS, parse_metric
from patchscope_nn.metrics.columns import as_column
from patchscope_nn.metrics.registry import as_metric
from patchscope_nn.runs.experiments import compare_runs

SCOPE = ps.Patchscope(
    source=ps.Source(prompt="{text}", layer=[0, 2]),
    target=ps.Target(prompt="The city x", position="x"),
    readout=ps.Generate(max_new_tokens=3),
)
ROWS = [{"text": "The Eiffel Tower"}, {"text": "in the city of"}, {"text": "Paris"}]
CONTROLS = ["unpatched", "random"]


def words(columns, row):
    return len(columns["text"].split()) + len(row["text"]) + (columns["source_layer"] or 0)


def first_word(columns, row) -> str:
    return (columns["text"].split() or ["-"])[0]


def letters(columns, row) -> list[str]:
    return list(columns["first_word"])


def width(columns, row):
    return len(columns["letters"])


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    place = tmp_path_factory.mktemp("own") / "run"
    return ps.run(
        SCOPE,
        model=tiny_model(),
        data=ROWS,
        controls=CONTROLS,
        columns=[first_word, letters],
        metrics=[words, width],
        out=place,
    )


def test_a_function_has_all_that_a_metric_has(finished):
    table = finished.table()
    assert list(table.columns[-5:]) == ["first_word", "letters", "words", "width", "error"]
    assert table["error"].isna().all()
    assert (table["width"] == table["first_word"].str.len()).all()
    summary = finished.summary()
    assert set(summary["metric"]) == {"words", "width"}
    assert set(summary["control"]) == {"patched", *CONTROLS}
    assert summary["low"].notna().all()
    page = (finished.path / "report.html").read_text()
    assert "words by source layer" in page
    assert '"label":"first word"' in page
    stored = pq.read_table(finished.path / "cells.parquet").to_pandas()
    assert list(stored["first_word"]) == list(table["first_word"])
    assert [list(found) for found in stored["letters"]] == list(table["letters"])


def test_a_run_is_read_without_the_code_of_its_metric(finished, tiny_model):
    lower = ps.run(SCOPE, model=tiny_model(), data=ROWS, metrics=[as_metric(words, higher_is_better=False)])
    again = ps.load_run(finished.path)
    assert again.metrics == ["words", "width"]
    assert again.manifest["metrics"][0] | {"digest": ""} == {
        "name": "words",
        "title": "words",
        "readout": "generate",
        "higher_is_better": True,
        "digest": "",
    }
    assert compare_runs({"a": again, "b": finished}).metrics == ("words", "width")
    best = {"a": lower.manifest, "b": finished.manifest}
    assert [found["metrics"][0]["higher_is_better"] for found in best.values()] == [False, True]


def test_the_best_is_taken_the_way_a_metric_says(tiny_model):
    recipe = {
        "name": "a",
        "source": {"prompt": "{text}", "layer": [0, 2]},
        "best_over": ["source_layer", "target_layer"],
    }
    recipe |= {
        "target": {"prompt": "The city x", "position": "x"},
        "readout": {"generate": {"max_new_tokens": 3}},
    }
    means = {}
    for higher in (True, False):
        metric = as_metric(words, higher_is_better=higher)
        run = ps.run(ps.Recipe(**recipe, metrics=[metric]), model=tiny_model(), data=ROWS)
        (means[higher],) = run.summary()["mean"]
        values = run.table().groupby("row")["words"]
        assert means[higher] == pytest.approx((values.max() if higher else values.min()).mean())
    assert means[True] > means[False]


def test_the_same_call_resumes_and_a_changed_metric_does_not(finished, tiny_model):
    given = {"model": tiny_model(), "data": ROWS, "controls": CONTROLS, "columns": [first_word, letters]}
    again = ps.run(SCOPE, **given, metrics=[words, width], out=finished.path)
    assert len(again.manifest["sessions"]) == 1

    def other(columns, row):
        return len(columns["text"])

    with pytest.raises(FolderError, match="holds cells of another run: its metrics is"):
        ps.run(SCOPE, **given, metrics=[as_metric(other, name="words"), width], out=finished.path)


def constant(value):
    def metric(columns, row):
        if isinstance(value, Exception):
            raise value
        return value

    return as_metric(metric, name="m")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        ("three", "TypeError: it returned 'three', which is not a number; return a number or None"),
        ([1.0], "TypeError: it returned [1.0], which is not a number; return a number or None"),
        (math.nan, "ValueError: it returned nan; return a finite number, or None if there is none"),
        (math.inf, "ValueError: it returned inf; return a finite number, or None if there is none"),
    ],
    ids=str,
)
def test_a_metric_that_fails_is_the_cells_error_and_the_run_goes_on(value, problem, tiny_model):
    run = ps.run(SCOPE, model=tiny_model(), data=ROWS[:1], metrics=[constant(value), words])
    table = run.table()
    assert set(table["error"]) == {f"metric m failed: {problem}."}
    assert table["m"].isna().all()
    assert table["words"].notna().all()
    assert table["text"].notna().all()
    assert run.summary().metric.tolist() == ["words", "words"]


@pytest.mark.parametrize(("value", "number"), [(True, 1.0), (3, 3.0), (None, None)])
def test_a_number_a_boolean_or_none_is_a_value(value, number):
    assert compute_metrics([parse_metric(constant(value))], {}, {}) == ({"m": number}, [])


def test_a_function_cannot_change_the_cell():
    def rude(columns, row):
        columns["text"] = ""

    found = compute_metrics([parse_metric(rude)], {"text": "a"}, {})
    assert found.problems == [
        "metric rude failed: TypeError: 'mappingproxy' object does not support item assignment."
    ]


def test_a_column_of_another_type_than_it_says_is_the_cells_error(tiny_model):
    def wrong(columns, row) -> float:
        return columns["text"]

    run = ps.run(SCOPE, model=tiny_model(), data=ROWS[:1], columns=[wrong], metrics=[words])
    (error,) = set(run.table()["error"])
    assert error.startswith("column wrong failed: TypeError: it returned '")
    assert "which is not a number; annotate the return type, for example -> str." in error
    assert run.table()["words"].notna().all()


def contains(columns, row):
    return 1


def text(columns, row):
    return 1


def one_argument(columns):
    return 1


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([contains], "the metric 'contains' of test_own:contains has the same name as that of patchscope_nn"),
        ([text], "metric 'text' has the name of a column of the table"),
        ([one_argument], "the metric one_argument is not a function of (columns, row): too many positional"),
        ([lambda columns, row: 1], "'<lambda>' cannot be the name of a metric"),
        ([{"function": "no_such_module:f"}], "'no_such_module:f' cannot be imported: No module named"),
        ([{"function": "f"}], "function: 'f' should be module:name"),
        ([as_metric(words, readout="hidden")], "words reads hidden, and the readout is generate"),
        ([as_metric(words, needs="relevancy")], "words needs readout.generate.relevancy: true"),
    ],
)
def test_what_cannot_be_a_metric_is_said_before_the_run(metrics, message, tiny_model):
    with pytest.raises(SpecError) as caught:
        ps.run(SCOPE, model=tiny_model(), data=ROWS, metrics=metrics)
    assert message in str(caught.value)


def test_registered_names_are_known_and_taken(registries, tiny_model):
    ps.metric(words)
    ps.metric(words)  # as a notebook's cell that runs again
    assert "words" in METRICS
    with pytest.raises(ValueError, match=r"'wordz' is not a known metric\. Did you mean 'words'\?"):
        parse_metric("wordz")
    with pytest.raises(InputError, match="has the same name as that of test_own:words; give it another name"):
        ps.metric(name="words")(contains)
    with pytest.raises(InputError, match="has the same name as that of patchscope_nn; give it another name"):
        ps.metric(contains)
    run = ps.run(SCOPE, model=tiny_model(), data=ROWS[:1], metrics=["words"])
    assert run.manifest["recipe"]["metrics"] == ["words"]


def test_a_recipe_names_functions_and_lint_imports_none(tmp_path, monkeypatch, tiny_model):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "name: own\nsource: {prompt: '{text}', layer: 1}\ntarget: {prompt: The city x, position: x}\n"
        "data: {function: own_code:rows, arguments: {n: 2}}\nreadout: {generate: {max_new_tokens: 2}}\n"
        "columns: [{function: own_code:first_word}]\n"
        "metrics: [{function: own_code:share, reference: text}]\nscore: share\n"
    )
    from patchscope_nn.recipe import dump, lint, load_recipe

    assert lint(recipe) == []
    loaded = load_recipe(recipe)
    assert ps.Recipe(**dump(loaded)) == loaded
    with pytest.raises(InputError, match="cannot be imported"):
        ps.run(recipe, model=tiny_model())

    def share(columns, row, *, reference):
        return len(columns["first_word"]) / len(row[reference])

    module = ModuleType("own_code")
    module.rows, module.first_word, module.share = lambda n: ROWS[:n], first_word, share
    monkeypatch.setitem(sys.modules, "own_code", module)
    run = ps.run(recipe, model=tiny_model())
    assert run.metrics == ["share"]
    assert len(run.table()) == 2
    assert run.table()["share"].notna().all()
    assert run.manifest["recipe"]["metrics"] == [{"function": "own_code:share", "reference": "text"}]


def test_a_reader_that_fails_is_an_error_that_names_it(registries, tiny_model):
    def failing():
        raise KeyError("text")
        yield {}

    with pytest.raises(InputError, match=r"failing failed: KeyError: 'text'\."):
        ps.run(SCOPE, model=tiny_model(), data=failing)
    ps.reader(name="mine")(lambda n=1: ROWS[:n])
    run = ps.run(SCOPE, model=tiny_model(), data={"reader": "mine", "arguments": {"n": 2}})
    assert run.table()["row"].nunique() == 2
    with pytest.raises(SpecError, match=r"'min' is not a known reader\. Did you mean 'mine'\?"):
        ps.run(SCOPE, model=tiny_model(), data={"reader": "min"})


def test_a_named_mapping_runs_and_is_told_apart_by_its_code(registries, tiny_model):
    ps.mapping(name="zeros")(lambda states: states * 0)
    scope = SCOPE.model_copy(update={"mapping": "zeros"})
    run = ps.run(scope, model=tiny_model(), data=ROWS[:1])
    assert set(run.table()["mapping"]) == {"zeros"}
    assert run.manifest["mapping"]["weights"]


def test_what_a_column_may_return():
    def odd(columns, row) -> dict[str, int]:
        return {}

    with pytest.raises(ValueError, match=r"a column can hold str, float, int, bool, list\[str\]"):
        as_column(odd)
    assert as_column(letters).kind == "texts"
    assert as_column(lambda columns, row: "a", name="a").kind == "text"
