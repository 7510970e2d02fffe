"""`patchscope fit KIND`: what it writes, what it prints, and that a Patchscope takes it."""

from __future__ import annotations

import json
import sys

import hooks
import pytest
import tiny
import torch
import typer
from lens_files import write_jacobian_lens, write_tuned_lens
from safetensors import safe_open
from test_fit_text import ROWS, TEXTS

import patchscope_nn as ps
from patchscope_nn import cli
from patchscope_nn.fitting.trained.kinds import KINDS, TRAINED
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.mappings.published import read_jacobian_lens, read_tuned_lens
from patchscope_nn.readouts import NextToken
from patchscope_nn.spec import TRAIN_KINDS, Patchscope, Source, Target
from patchscope_nn.spec.training import _FIELDS

TRAINING = ["--steps", "20", "--held-out", "0.2"]
THROUGH_TEXT = [
    *("--source-prompt", "The city of {word}", "--layer", "1", "--text", "{said}"),
    *("--target-prompt", "The Paris -> x", "--target-position", "x", "--target-layer", "[0, 1]"),
]
#: Kind -> its options, and the pairs it should have maps for.
CASES = {
    "tuned_lens": ([*TRAINING, "--data", "texts.jsonl", "--layer", "[embed, 1]"], [[-1, 3], [1, 3]]),
    "jacobian_lens": (["--data", "texts.jsonl", "--layer", "1", "--skip-first", "2"], [[1, 3]]),
    "lre": (
        ["--data", "rows.jsonl", "--layer", "1", "--prompt", "The city of {word} is", "--subject", "word"],
        [[1, 3]],
    ),
    **{kind: ([*TRAINING, "--data", "rows.jsonl", *THROUGH_TEXT], [[1, 0], [1, 1]]) for kind in TRAINED[4:]},
}


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in {"rows": ROWS, "texts": [{"text": text} for text in TEXTS]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["patchscope", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_every_kind_has_a_command():
    assert [*CASES, "soft_prompt"] == [*TRAINED[:2], *TRAINED[3:], TRAINED[2]]


@pytest.mark.parametrize("name", TRAINED)
def test_every_option_of_a_kind_is_offered_with_its_default(name):
    kind = KINDS[name]
    parameters = kind.parameters
    for option in set(parameters) - {"training", "source", "target"}:
        assert parameters[option].annotation.__metadata__[0].help
    assert ("training" in parameters) == (kind.training is not None)
    assert kind.summary
    if name in TRAIN_KINDS:
        fields = {"column", *Training.model_fields} if kind.training else {"column"}
        assert set(_FIELDS[name]) <= fields | set(parameters)
    group = typer.main.get_command(cli.app).commands["fit"]
    defaults = {parameter.name: parameter.default for parameter in group.get_command(None, name).params}
    expected = kind.training.model_dump() if kind.training else {}
    expected |= {
        option: parameters[option].default
        for option in ("max_tokens", "skip_first", "subjects", "tokens")
        if option in parameters
    }
    assert {option: defaults[option] for option in expected} == expected


@pytest.mark.parametrize("kind", list(CASES))
def test_a_mapping_is_fitted_printed_and_saved(kind, place, monkeypatch, capsys):
    options, pairs = CASES[kind]
    assert run(monkeypatch, "fit", kind, "--model", place, *options, "--out", "f.safetensors", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    fitted = ps.Fitted.load("f.safetensors")
    assert (said["kind"], fitted.kind) == (kind, kind)
    assert said["pairs"] == pairs == [list(pair) for pair in fitted.pairs]
    assert said["file"] == "f.safetensors"
    assert said["source_model"]["name"] == str(place)
    assert said["data"]["fingerprint"]
    assert said["command"].startswith(f"patchscope fit {kind} --model")
    assert [one[:2] for one in said["held_out"]] == pairs
    assert run(monkeypatch, "fit", kind, "--model", place, *options, "--out", "g.safetensors") == 0
    printed = capsys.readouterr().out
    assert f"{kind}, on held-out data" in printed
    again = ps.Fitted.load("g.safetensors")
    for pair in fitted.pairs:
        assert all(
            torch.equal(tensor, again.parts(pair)[name]) for name, tensor in fitted.parts(pair).items()
        )


def test_a_soft_prompt_is_fitted_and_saved(place, monkeypatch, capsys):
    options = [*TRAINING, "--data", "texts.jsonl", "--layer", "1", "--tokens", "4", "--offsets", "1"]
    assert run(monkeypatch, "fit", "soft_prompt", "--model", place, *options, "--out", "s.safetensors") == 0
    assert "kl_nats_1" in capsys.readouterr().out
    with safe_open("s.safetensors", framework="pt") as opened:
        said = json.loads(opened.metadata()["patchscope_nn"])
        assert opened.get_tensor("soft_prompt").shape == (4, tiny.D_MODEL)
    assert (said["kind"], said["settings"]["layer"], said["settings"]["offsets"]) == ("soft_prompt", 1, [1])
    assert said["data"]["spec"] == {"file": "texts.jsonl"}


BAD = {
    "no such column": (
        ["tuned_lens", "--data", "rows.jsonl", "--column", "wrod"],
        (
            "error: column='wrod' is not a column of the data.\n"
            "  hint: Did you mean 'word'? Allowed: word, said.\n"
        ),
    ),
    "several columns": (
        ["tuned_lens", "--data", "rows.jsonl"],
        (
            "error: the data has the columns word, said, and none was named.\n"
            "  hint: Name the column of the texts (--column).\n"
        ),
    ),
    "a layer outside the model": (
        ["tuned_lens", "--data", "texts.jsonl", "--layer", "4"],
        (
            "error: layer=4 is outside this model, whose 4 blocks are 0..3 (or -4..-1 from the end).\n"
            "  hint: Use 'embed' for the input of block 0.\n"
        ),
    ),
    "too few rows": (
        ["tuned_lens", "--data", "texts.jsonl", "--limit", "2"],
        (
            "error: 2 different texts of 2 tokens or more are too few to fit on some and hold out others.\n"
            "  hint: Give at least 3, and better some hundreds.\n"
        ),
    ),
    "no steps": (
        ["tuned_lens", "--data", "texts.jsonl", "--steps", "0"],
        "error: Training: steps: input should be greater than or equal to 1; given 0\n",
    ),
    "a Hub data set without a split": (
        ["tuned_lens", "--data", "hub:org/name"],
        "error: --data='hub:org/name' names no split.\n  hint: Write hub:org/name:train.\n",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_ends_with_a_message(case, place, monkeypatch, capsys):
    arguments, message = BAD[case]
    assert run(monkeypatch, "fit", *arguments, "--model", place, "--out", "f.safetensors") == 2
    assert capsys.readouterr().err == message


def lens_says(model, mapping, run_cells, *, layer="all"):
    """For each layer the top token and its probability, through the compiler."""
    scope = Patchscope(
        source=Source(prompt="The Eiffel Tower is", layer=layer),
        target=Target(prompt="The city", layer=-1),
        mapping=mapping,
        readout=NextToken(top_k=1),
    )
    return {cell.source_layer: readout for cell, readout in run_cells(scope, model)}


@pytest.mark.parametrize("kind", ["tuned_lens", "jacobian_lens"])
def test_a_published_lens_is_read_by_its_key(kind, tiny_model, run_cells, tmp_path):
    """Through the compiler it says unembed(f(h)), and at the last block unembed(h)."""
    model, reference = tiny_model(), tiny.reference("llama")
    file = tmp_path / "lens.pt"
    if kind == "tuned_lens":
        write_tuned_lens(tmp_path)
    else:
        write_jacobian_lens(file)
    place = str(tmp_path if kind == "tuned_lens" else file)
    layers = ("embed", 0, 1, 2, 3) if kind == "tuned_lens" else (0, 2, 3)
    found = lens_says(model, {kind: place}, run_cells, layer=layers)
    ids = tiny.TOKENIZER("The Eiffel Tower is")["input_ids"]
    maps = (read_tuned_lens if kind == "tuned_lens" else read_jacobian_lens)(place)
    for layer in (-1, 0, 1, 2, 3) if kind == "tuned_lens" else (0, 2, 3):
        h = reference.state(ids, hooks.Site(layer), [len(ids) - 1])[0]
        tensors = maps.get(layer, {"weight": torch.eye(32)})
        f = tensors["weight"] @ h + tensors.get("bias", 0)
        with torch.no_grad():
            expected = reference.module.lm_head(reference.module.model.norm(f)).softmax(-1)
        assert found[layer]["top_ids"] == [int(expected.argmax())]
        assert found[layer]["top_probs"][0] == pytest.approx(float(expected.max()), abs=1e-5)


def test_a_published_lens_of_another_model_is_refused(tiny_model, run_cells, tmp_path):
    write_jacobian_lens(tmp_path / "lens.pt")
    with pytest.raises(ps.InputError, match=r"is for states of 32 numbers .* has 48"):
        lens_says(tiny_model(d_model=48), {"jacobian_lens": str(tmp_path / "lens.pt")}, run_cells)
    with pytest.raises(ps.InputError, match=r"no map for \(l:l\*\) 1:3"):
        lens_says(tiny_model(), {"jacobian_lens": str(tmp_path / "lens.pt")}, run_cells)


def test_python_fits_saves_and_uses_a_lens(tiny_model, run_cells, tmp_path):
    """What is fitted is a mapping at once, and the same mapping from its file."""
    options = {"data": [{"text": text} for text in TEXTS], "layers": "all", "training": Training(steps=20)}
    for _ in range(2):  # the first call imports the package that the second one calls
        fitted = ps.fit("tuned_lens", model=tiny_model(), out=tmp_path / "lens.safetensors", **options)
    first, again = (
        lens_says(tiny_model(), mapping, run_cells)
        for mapping in (fitted, {"fitted": str(tmp_path / "lens.safetensors")})
    )
    assert first == again
    assert set(first) == {0, 1, 2, 3}


def test_an_unknown_kind_is_no_kind():
    with pytest.raises(ps.InputError, match="Did you mean 'tuned_lens'"):
        ps.fit("tuned_lense", model=None, data=[{"text": "x"}])
