"""Recipes with several methods: read, planned, run, resumed and compared; and runs compared by folder."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pandas as pd
import parts
import pytest
import tiny
from commands import caller

import patchscope_nn as ps
from patchscope_nn.analysis.statistics import best_over
from patchscope_nn.errors import FolderError, InputError, SpecError
from patchscope_nn.recipe import Recipe, dump, lint, load_recipe
from patchscope_nn.runs.execute import plan_run
from patchscope_nn.runs.experiments import compare_runs, load_runs, open_finished
from patchscope_nn.runs.prepare import prepare

RECIPE = """\
name: lenses
title: Which lens sees it first?
data: {rows: [{text: The Eiffel Tower}, {text: the city of Paris}, {text: Diana is in Paris}]}
source: {prompt: "{text}"}
target: {prompt: "The city -> "}
readout: {next_token: {top_k: 2, reference: source}}
metrics: [nll_nats, precision_at_1]
controls: [unpatched, random, shuffled]
methods:
  token identity:
  Logit lens: {target: {prompt: null, layer: -1}}
  "last position, top 3": {readout.next_token.top_k: 3, target.position: 0}
"""
SLUGS = ["token-identity", "logit-lens", "last-position-top-3"]
NAMES = ["token identity", "Logit lens", "last position, top 3"]
N_CELLS = 3 + 3 * 4 * 3


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a tiny model and a recipe that names it."""
    place = tmp_path_factory.mktemp("experiments")
    tiny.make_module("llama").save_pretrained(place / "model")
    tiny.TOKENIZER.save_pretrained(place / "model")
    (place / "lenses.yaml").write_text(RECIPE + "model: model\n")
    return place


@pytest.fixture
def patchscope(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    return caller(monkeypatch, capsys)


def recipe(here, **more):
    return Recipe(**dump(load_recipe(here / "lenses.yaml")) | {"model": str(here / "model")} | more)


# What is read.


def test_each_method_is_the_recipe_with_its_changes(here):
    of = load_recipe(here / "lenses.yaml").of_methods()
    assert list(of) == NAMES
    identity, lens, last = of.values()
    assert [one.name for one in of.values()] == [f"lenses-{slug}" for slug in SLUGS]
    assert identity.scope == load_recipe(here / "lenses.yaml").scope
    assert (lens.target.prompt, lens.target.layer) == (None, -1)
    assert (last.target.prompt, last.target.position) == ("The city -> ", 0)
    assert (last.readout.top_k, last.readout.reference) == (3, "source")
    assert not any(one.methods for one in of.values())


def test_a_set_reaches_every_method_and_one_alone(here):
    read = load_recipe(
        here / "lenses.yaml", sets=["source.layer=2", "methods.Logit lens.target.layer=1", "seed=5"]
    ).of_methods()
    assert [one.source.layer for one in read.values()] == [2, 2, 2]
    assert [one.seed for one in read.values()] == [5, 5, 5]
    assert read["Logit lens"].target.layer == 1


def test_a_recipe_with_methods_dumps_without_loss(here):
    read = load_recipe(here / "lenses.yaml")
    assert Recipe(**dump(read)) == read
    assert Recipe(**read.model_dump(mode="json")) == read
    assert lint(here / "lenses.yaml") == []


def test_a_mapping_of_python_is_kept():
    made = Recipe(
        name="a", title="b", source={"prompt": "x"}, mapping=_double, methods={"a": {}, "b": {"seed": 2}}
    )
    assert [one.mapping for one in made.of_methods().values()] == [_double, _double]


def _double(state):
    return 2 * state


WRONG = {
    "methods: [a, b]": [
        (
            "line 8: methods: should be a mapping of two or more names, each to its changes: "
            "{logit lens: {target.layer: -1}}"
        )
    ],
    "methods: {a: {}}": [
        (
            "line 8: methods: should be a mapping of two or more names, each to its changes: "
            "{logit lens: {target.layer: -1}}"
        )
    ],
    "methods:\n  a: {}\n  b: {target: {layers: 3}}": [
        (
            "line 10: methods.b.target.layers: is not a field here. Did you mean 'layer'? "
            "Allowed: prompt, prompts, combine, position, layer,"
        )
    ],
    "methods:\n  a: 3\n  b: {name: x}": [
        "line 9: methods.a: should be a mapping of changes, or empty; given 3",
        "line 10: methods.b.name: cannot be changed by a method; leave it out. Allowed: model, data,",
    ],
    "methods:\n  a b: {}\n  A-B: {}": [
        "line 10: methods.A-B: has the same folder, 'a-b', as 'a b'; give it another name"
    ],
    "methods:\n  a: {}\n  '??': {}": [
        "line 10: methods.??: has neither letter nor digit; name the method in words"
    ],
    "methods:\n  a: {}\n  b: {readout: generate}": [
        "line 10: methods.b.metrics.0: nll_nats reads next_token, and the readout is generate",
        "line 10: methods.b.metrics.1: precision_at_1 reads next_token, and the readout is generate",
    ],
    "methods:\n  a: {}\n  b: {readout.generate.max_new_tokens: 3}": [
        "line 10: methods.b.readout.generate.max_new_tokens: readout is next_token here; set readout=generate"
    ],
    "best_over: [source_layers]": [
        (
            "line 8: best_over.0: 'source_layers' is not allowed here. Did you mean 'source_layer'? "
            "Allowed: source_layer, target_layer."
        )
    ],
    "score: nll": ["line 8: score: 'nll' is not a metric of this recipe. Did you mean 'nll_nats'?"],
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_with_methods_has_its_line(tmp_path, text):
    base = RECIPE.partition("controls:")[0]
    (tmp_path / "wrong.yaml").write_text(f"{base}{text}\n")
    with pytest.raises(SpecError) as caught:
        load_recipe(tmp_path / "wrong.yaml")
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == len(WRONG[text])
    for one, expected in zip(found, WRONG[text], strict=True):
        assert one.startswith(expected)


def test_a_wrong_method_in_python():
    with pytest.raises(SpecError, match=r"methods\.b\.target\.layers: is not a field here"):
        Recipe(name="a", title="b", source={"prompt": "x"}, methods={"a": {}, "b": {"target.layers": 1}})


def test_lint_looks_up_the_columns_of_methods(tmp_path):
    text = RECIPE.replace("target.position: 0", 'target.prompt: "{txt} -> "')
    (tmp_path / "r.yaml").write_text(text)
    (problem,) = lint(tmp_path / "r.yaml")
    assert (problem.field, problem.line) == ("methods.last position, top 3.target.prompt", 12)
    assert "asks for the column 'txt'" in problem.message


# What is run.


def test_methods_are_run_and_compared(here, tmp_path):
    progress = []
    experiment = ps.run(recipe(here), out=tmp_path, progress=lambda *step: progress.append(step))
    assert isinstance(experiment, ps.Experiment)
    assert list(experiment) == NAMES
    assert {one.name for one in tmp_path.iterdir()} == {
        *SLUGS,
        *(f"comparison.{ending}" for ending in ("json", "csv", "html")),
    }
    assert progress[-1] == (3 * N_CELLS, 3 * N_CELLS)
    assert progress == sorted(progress)
    alone = ps.run(recipe(here).of_methods()["Logit lens"])
    pd.testing.assert_frame_equal(experiment["Logit lens"].table(), alone.table(), atol=1e-4, rtol=1e-4)
    comparison = experiment.compare()
    assert comparison.names == tuple(NAMES)
    assert comparison.metrics == ("nll_nats", "precision_at_1")
    real = [run.table().query("control.isna()")["nll_nats"].mean() for run in experiment.values()]
    found = comparison.between().query("first_control == 'patched' and metric == 'nll_nats'")
    assert found["mean"].tolist() == pytest.approx([real[1] - real[0], real[2] - real[0]])
    assert found["n_pairs"].tolist() == [12, 12]
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert kept["folders"] == dict(zip(NAMES, SLUGS, strict=True))
    assert len(kept["differences"]) == len(pd.read_csv(tmp_path / "comparison.csv"))
    page = (tmp_path / "comparison.html").read_text()
    assert "last position, top 3" in page


def test_the_report_of_an_experiment_has_figures_and_every_method(patchscope, here, tmp_path):
    out = tmp_path / "out"
    made = ps.run(recipe(here, metrics=["nll_nats"]), out=out, limit=2, report=False)
    pages = [out / "comparison.html", *(out / slug / "report.html" for slug in SLUGS)]
    assert not any(page.exists() for page in pages)
    said = json.loads(patchscope("report", str(out), "--figures", str(tmp_path / "figures"), "--json").stdout)
    assert said["report"] == str(pages[0])
    assert said["methods"] == [str(page) for page in pages[1:]]
    assert all(page.stat().st_size > 10_000 for page in pages)
    files = [Path(file) for file in said["figures"]]
    assert all(file.stat().st_size > 1000 for file in files)
    assert {file.suffix for file in files} == {".pdf", ".svg", ".png"}
    assert {file.parent.name for file in files} == {"figures", *SLUGS}
    opened = open_finished(out)
    assert list(opened) == NAMES
    shown = opened._repr_html_()
    assert shown == made._repr_html_()
    assert all(f"<td>{name}</td>" in shown for name in NAMES)
    assert "<script" not in shown
    first = next(iter(opened.values()))
    assert str(first.path) in first._repr_html_()
    assert isinstance(open_finished(first.path), ps.Run)


def test_a_plan_is_shown_in_notebooks(here):
    prepared = prepare(recipe(here).of_methods()[NAMES[0]], limit=2)
    planned = plan_run(prepared.only)
    shown = planned._repr_html_()
    assert f"plan {planned.digest}" in shown
    assert f"cells: {planned.n_cells} " in shown
    assert "<td>+ row packing</td>" in shown
    assert html.escape(str(planned)) in shown


def test_an_experiment_goes_on_where_it_was_left(here, tmp_path):
    asked = recipe(here)
    only = {name: changes for name, changes in asked.methods.items() if name != NAMES[2]}
    ps.run(asked.model_copy(update={"methods": only}), out=tmp_path)
    lines = {slug: parts.contents(tmp_path / slug) for slug in SLUGS[:2]}
    whole = ps.run(asked, out=tmp_path)
    assert {slug: parts.contents(tmp_path / slug) for slug in SLUGS[:2]} == lines
    assert [len(run.manifest["sessions"]) for run in whole.values()] == [1, 1, 1]
    assert whole.path == tmp_path


def test_in_memory_and_by_name(here, monkeypatch):
    monkeypatch.chdir(here)
    experiment = ps.run("lenses.yaml", limit=2)
    assert experiment.path is None
    assert [len(run.rows) for run in experiment.values()] == [2 + 2 * 4 * 3] * 3
    with pytest.raises(InputError, match="has no folder"):
        experiment.report()
    assert experiment.report(here / "side-by-side.html").stat().st_size > 100_000


def test_a_model_is_loaded_once(here, monkeypatch):
    loaded = []
    load = ps.load
    prepared = prepare(recipe(here), loader=lambda *one, **more: loaded.append(one) or load(*one, **more))
    assert loaded == [(str(here / "model"),)]
    assert len({id(one.source) for one in prepared.runs.values()}) == 1


def test_a_folder_of_one_run_is_not_an_experiments(here, tmp_path):
    ps.run(recipe(here).of_methods()[NAMES[0]], out=tmp_path)
    with pytest.raises(FolderError, match="holds a run"):
        ps.run(recipe(here), out=tmp_path)


def test_a_method_with_a_probe_is_compared_by_score(here):
    words = ("Paris", "Diana", "city")
    rows = [{"text": f"{start} {word}", "word": word} for start in ("The", "in", "of", "a") for word in words]
    asked = Recipe(
        name="attributes",
        title="What can be read?",
        model=str(here / "model"),
        data={"rows": rows},
        source={"prompt": "{text}"},
        target={"prompt": "The city -> x", "layer": "all"},
        readout={"generate": {"max_new_tokens": 2}},
        metrics=[{"contains": {"reference": "word"}}],
        controls=["shuffled"],
        best_over=["target_layer"],
        score="contains",
        methods={
            "patchscope": {},
            "probe": {
                "target": {"prompt": None, "layer": "same"},
                "readout": "hidden",
                "metrics": [],
                "score": "probe_accuracy",
                "probe": {"label": "word"},
            },
        },
    )
    comparison = ps.run(asked).compare()
    assert comparison.metrics == ("score",)
    found = comparison.between().query("first_control == 'patched'").iloc[0]
    assert (found["n_pairs"], found["n_layers"]) == (12 * 4, 4)


def test_best_over_reaches_summary_and_report(here, tmp_path):
    one = recipe(here, methods={}, target={"prompt": "The city -> ", "layer": "all"})
    for over in (["target_layer"], ["source_layer", "target_layer"]):
        run = ps.run(one.model_copy(update={"best_over": tuple(over)}), out=tmp_path / "run")
        summary = run.summary().query("metric == 'nll_nats' and control == 'random'")
        best = best_over(run.table(), metric="nll_nats", over=over).query("control == 'random'")
        assert summary["mean"].mean() == pytest.approx(best["nll_nats"].mean())
        assert len(summary) == (4 if over == ["target_layer"] else 1)
        assert (
            f"best over {' and '.join(over).replace('_', ' ')}" in (tmp_path / "run/report.html").read_text()
        )
    assert len(run.manifest["sessions"]) == 1  # only what is made of the cells has changed


# The command line.


def test_run_prints_one_comparison(patchscope, here):
    done = patchscope("run", "lenses.yaml", "--limit", "2", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "Which lens sees it first?" in done.stdout
    assert "differences are to token identity" in done.stdout
    assert f"{3 * 26} cells of 3 methods in out" in done.stdout
    assert "page: out/comparison.html" in done.stdout
    again = json.loads(patchscope("run", "lenses.yaml", "--limit", "2", "--out", "out", "--json").stdout)
    assert list(again["methods"]) == NAMES
    assert again["comparison"]["metrics"] == ["nll_nats", "precision_at_1"]
    for one in again["comparison"]["means"]:
        assert f"{one['mean']:.2f}" in done.stdout
        assert f"[{one['low']:.2f}, {one['high']:.2f}]" in done.stdout
    rehearsed = patchscope(
        "run", "lenses.yaml", "--limit", "2", "--remote", "local", "--out", "rehearsed", "--json"
    )
    other = json.loads(rehearsed.stdout)
    for one, two in zip(again["comparison"]["means"], other["comparison"]["means"], strict=True):
        assert one["mean"] == pytest.approx(two["mean"], abs=1e-4)


def test_run_prints_the_best_of_controls_too(patchscope):
    words = ("--set", "methods={}", "--set", "target.layer=all", "--limit", "2", "--out", "bests")
    done = patchscope("run", "lenses.yaml", *words, "--set", "best_over=[target_layer]")
    assert done.returncode == 0, done.stderr
    assert "mean over 2 data rows with 95 % intervals, best over target layer, by source layer" in " ".join(
        done.stdout.split()
    )
    whole = patchscope("run", "lenses.yaml", *words, "--set", "best_over=[source_layer, target_layer]")
    assert [line.split()[0] for line in whole.stdout.splitlines() if line.startswith("all")] == ["all"]
    assert "98 of 98" not in whole.stderr  # nothing was run again


def test_a_recipe_without_methods_is_an_experiment_of_one(here):
    methods = prepare(recipe(here), limit=2)
    assert methods.folders(Path("out")) == {
        name: Path("out") / slug for name, slug in zip(NAMES, SLUGS, strict=True)
    }
    with pytest.raises(ValueError, match="too many values"):
        methods.only  # noqa: B018 (the access is the test)
    single = prepare(recipe(here).of_methods()[NAMES[0]], limit=2)
    assert single.folders(Path("out")) == {f"lenses-{SLUGS[0]}": Path("out")}
    assert single.digest == single.only.digest == methods.runs[NAMES[0]].digest


def test_plan_shows_every_method_and_writes_nothing(patchscope, here):
    before = set(here.rglob("*"))
    done = patchscope("plan", "lenses.yaml", "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("method: ")] == [
        f"method: {name}" for name in NAMES
    ]
    assert set(here.rglob("*")) == before
    counts = json.loads(patchscope("plan", "lenses.yaml", "--limit", "2", "--json").stdout)["methods"]
    assert [counts[name]["cells"] for name in NAMES] == [26, 26, 26]
    assert counts["Logit lens"]["folder"].endswith("/logit-lens")


def test_lint_says_what_is_wrong_with_a_method(patchscope, here):
    (here / "bad.yaml").write_text(RECIPE.replace("layer: -1", "layr: -1"))
    done = patchscope("lint", "bad.yaml")
    assert done.returncode == 2
    assert "bad.yaml:11: methods.Logit lens.target.layr: is not a field here" in done.stdout


def test_compare_runs_by_folder(patchscope, here):
    for name, more in (("one", ()), ("two", ("--set", "methods={}", "--set", "seed=3"))):
        done = patchscope("run", "lenses.yaml", "--out", name, *more)
        assert done.returncode == 0, done.stderr
    done = patchscope("compare", "one/token-identity", "two", "--out", "page.html")
    assert done.returncode == 0, done.stderr
    assert "lenses compared with lenses-token-identity" in done.stdout
    assert "page: page.html" in done.stdout
    assert (here / "page.html").stat().st_size > 100_000
    plain = json.loads(patchscope("compare", "one/token-identity", "two", "--json").stdout)
    (line,) = [
        one
        for one in plain["differences"]
        if one["first"] != one["second"] and one["first_control"] == "patched" and one["metric"] == "nll_nats"
    ]
    assert line["mean"] == pytest.approx(0, abs=1e-6)  # another seed moves controls alone
    whole = json.loads(patchscope("compare", "one", "--json", "--best-over", "source_layer").stdout)
    assert whole["runs"] == NAMES
    assert whole["best_over"]["Logit lens"] == ["source_layer"]


def test_compare_takes_two(patchscope, here):
    patchscope("run", "lenses.yaml", "--out", "single", "--set", "methods={}")
    done = patchscope("compare", "single")
    assert done.returncode == 2
    assert "error: these runs cannot be compared: lenses." in done.stderr
    assert "Give two or more different runs." in done.stderr


def test_runs_that_are_alike_are_named_by_folder(here, tmp_path):
    one = recipe(here, methods={})
    for name in ("a", "b"):
        ps.run(one, out=tmp_path / name)
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    assert list(runs) == ["a", "b"]
    assert compare_runs(runs).names == ("a", "b")
    with pytest.raises(FolderError, match="is not the folder of a run"):
        load_runs([tmp_path])
