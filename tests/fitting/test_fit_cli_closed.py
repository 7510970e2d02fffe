"""`patchscope fit`, and what `plan` and `run` say of the fits they use."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import typer
from commands import caller

from patchscope_nn import cli
from patchscope_nn.cli.fitting import parse_data
from patchscope_nn.errors import InputError
from patchscope_nn.mappings import Fitted
from patchscope_nn.spec import Fit
from patchscope_nn.spec.fitting import FIT_KINDS

WORDS = ("The", " Eiffel", " Tower", " is", " in", " the", " city", " of", " Paris", " Diana", "->")
RECIPE = """\
name: tiny
title: What comes next?
data: {rows: [{text: The Eiffel Tower}, {text: Diana is in Paris}]}
source: {prompt: "{text}", layer: [0, 2]}
target: {prompt: "The city -> ", layer: [1, 3]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny models of different sizes, texts, and a recipe."""
    here = tmp_path_factory.mktemp("fit")
    for name, family, size in (("one", "llama", 32), ("two", "gpt2", 48)):
        tiny.make_module(family, d_model=size).save_pretrained(here / name)
        tiny.TOKENIZER.save_pretrained(here / name)
    chosen = torch.randint(len(WORDS), (60, 9), generator=torch.Generator().manual_seed(0))
    texts = ["".join(WORDS[word] for word in row) for row in chosen.tolist()]
    (here / "texts.jsonl").write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts))
    (here / "tiny.yaml").write_text(RECIPE)
    return here


@pytest.fixture
def patchscope(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path / "cache"))
    return caller(monkeypatch, capsys)


MODELS = ("--source-model", "one", "--target-model", "two")


def test_fit_prints_a_table_and_writes_a_file(patchscope, folder):
    words = [
        "fit",
        "affine",
        *MODELS,
        "--data",
        "texts.jsonl",
        "--pairs",
        "embed:0,2:3",
        "--out",
        "a.safetensors",
    ]
    done = patchscope(*words)
    assert done.returncode == 0, done.stderr
    fitted = Fitted.load(folder / "a.safetensors")
    assert fitted.pairs == ((-1, 0), (2, 3))
    assert fitted.about.command == "patchscope " + " ".join(words)
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "l",
        "->",
        "l*",
        "of",
        "variance",
        "cosine",
        "of",
        "the",
        "mean",
        "n",
        "lambda",
    ]
    for line, pair, name in zip(lines[1:3], fitted.pairs, ("embed -> 0", "2 -> 3"), strict=True):
        found = fitted.about.held_out[pair]
        assert line.startswith(name)
        assert f"{found['fraction_of_variance']:.3f}" in line
        assert f"{found['cosine']:.3f}" in line
    said = fitted.about.data
    last = (
        f"affine, one -> two; fitted on {said['fitted_on']['n_positions']} positions of 48 texts, scored "
        f"on {said['held_out']['n_positions']} of 12 that were held out"
    )
    assert lines[4:] == [last, "a.safetensors"]
    assert "fitting affine: 60 of 60 texts" in done.stderr
    run = patchscope("run", "tiny.yaml", *MODELS, "--set", "mapping={fitted: a.safetensors}")
    assert run.returncode == 2
    assert "no map for (l:l*) 0:1, 0:3, 2:1. It has maps for (l:l*) embed:0, 2:3." in run.stderr.replace(
        "\n  hint:", ""
    )


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_the_defaults_are_those_of_a_fit(kind):
    """They are written down again, because the command line starts without pydantic."""
    command = typer.main.get_command(cli.app).commands["fit"].get_command(None, kind)
    defaults = {parameter.name: parameter.default for parameter in command.params}
    for name in ("column", "limit", "positions", "max_tokens", "rank", "seed"):
        assert defaults[name] == getattr(Fit(), name)
    assert float(defaults["held_out"]) == Fit().held_out


def test_fit_as_json(patchscope, folder):
    words = ["fit", "low_rank", "--rank", "4", *MODELS, "--data", "texts.jsonl", "--pairs", "cross"]
    words += ["--source-layers", "[0, 1]", "--target-layers", "2:", "--out", "b.safetensors", "--json"]
    done = patchscope(*words, "--limit", "30", "--positions", "0", "--held-out", "0.5", "--seed", "3")
    said = json.loads(done.stdout)
    assert said["file"] == "b.safetensors"
    assert said["pairs"] == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert said["kind"] == "low_rank"
    assert said["settings"]["rank"] == 4
    assert said["settings"]["positions"] is None
    assert said["data"]["held_out"]["n_texts"] == 15
    assert said["seed"] == 3
    assert Fitted.load(folder / "b.safetensors").parts((0, 2))["up"].shape == (48, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["affin"], "No such command 'affin'. Did you mean 'affine'?"),
        (["affine", "--pairs", "0:9"], "pairs: l*=9 is outside this model"),
        (["affine", "--source-layers", "7"], "source_layers=7 is outside this model"),
        (["affine", "--data", "none.jsonl"], "none.jsonl"),
        (["affine", "--column", "words"], "has no column 'words'; it has n, text"),
        (["affine", "--held-out", "texts.jsonl"], "held_out names the same data as is fitted on"),
        (["affine", "--held-out", "2"], "held_out"),
        (["affine", "--rank", "2"], "only kind low_rank has a rank"),
        (["orthogonal"], "orthogonal maps between spaces of one size; these have 32 and 48"),
    ],
)
def test_what_cannot_be_fitted_is_a_message(words, message, patchscope, folder):
    defaults = ["--data", "texts.jsonl"] if "--data" not in words else []
    done = patchscope("fit", *words, *MODELS, *defaults, "--out", "never.safetensors")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "never.safetensors").exists()


def test_plan_and_run_say_which_fit_they_use(patchscope, folder, tmp_path):
    mapping = ["--set", "mapping={fit: {data: {file: texts.jsonl}}}"]
    plan = patchscope("plan", "tiny.yaml", *MODELS, *mapping)
    assert plan.returncode == 0, plan.stderr
    line = next(line for line in plan.stdout.splitlines() if line.startswith("mapping"))
    file = next(part for part in line.split() if part.endswith(".safetensors"))
    assert line == (
        "mapping fit:affine: 4 pairs of layers, to be fitted before the run on 48 texts (12 held out), and "
        f"saved in {file}"
    )
    assert file.startswith(str(tmp_path / "cache" / "fits" / "affine-"))
    run = patchscope("run", "tiny.yaml", *MODELS, *mapping)
    assert run.returncode == 0, run.stderr
    assert "fitting fit:affine: 60 of 60 texts" in run.stderr
    after = patchscope("plan", "tiny.yaml", *MODELS, *mapping)
    held = [found for *_, found in Fitted.load(file).about.dump()["held_out"]]
    line = next(line for line in after.stdout.splitlines() if line.startswith("mapping"))
    shares = [one["fraction_of_variance"] for one in held]
    cosines = [one["cosine"] for one in held]
    assert line == (
        f"mapping fit:affine: affine, 4 pairs of layers; on held-out texts {min(shares):.2f} to "
        f"{max(shares):.2f} of the variance, {min(cosines):.2f} to {max(cosines):.2f} cosine; {file}"
    )
    again = patchscope("run", "tiny.yaml", *MODELS, *mapping)
    assert "fitting" not in again.stderr
    said = json.loads(patchscope("plan", "tiny.yaml", *MODELS, *mapping, "--json").stdout)
    assert said["mapping"]["fit"]["file"] == file
    assert plan.stdout.splitlines()[-1] == after.stdout.splitlines()[-1]  # the run's folder


def test_a_file_for_other_models_is_noted(patchscope, folder):
    done = patchscope(
        "fit", "affine", *MODELS, "--data", "texts.jsonl", "--pairs", "cross", "--out", "c.safetensors"
    )
    assert done.returncode == 0, done.stderr
    (folder / "three").mkdir(exist_ok=True)
    tiny.make_module("llama", seed=1).save_pretrained(folder / "three")
    tiny.TOKENIZER.save_pretrained(folder / "three")
    words = ["--source-model", "three", "--target-model", "two", "--set", "mapping={fitted: c.safetensors}"]
    plan = patchscope("plan", "tiny.yaml", *words)
    note = (
        "note: mapping fitted:c.safetensors was fitted for the source one (d_model 32); this run's is three"
    )
    assert note in plan.stderr


def test_data_as_the_command_line_names_it():
    assert parse_data("builtin:contexts") == {"builtin": "contexts"}
    assert parse_data("hub:org/name:test") == {"hub": "org/name", "split": "test"}
    with pytest.raises(InputError, match="names no split"):
        parse_data("hub:org/name")
    assert parse_data("a/b.jsonl") == {"file": "a/b.jsonl"}
