"""Text that no tokenizer can read (half a character, or bytes no locale decodes) is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import patchscope_nn as ps
from patchscope_nn._util.plain import wrong_text
from patchscope_nn.errors import InputError
from patchscope_nn.recipe import lint

HALF = "The \ud83d city"
UNDECODED = "Café".encode().decode("ascii", "surrogateescape")
HOLDS = r"holds half a character, '\ud83d', which no tokenizer can read; write it whole"


@pytest.mark.quick
def test_what_is_text():
    assert wrong_text("Café 😀 \x00") == ""
    assert wrong_text(HALF) == rf"'The \ud83d city' {HOLDS}"
    assert wrong_text("\ud83d\ude00").endswith("write it whole")  # two halves are no whole in Python
    assert wrong_text(UNDECODED).startswith(
        r"'Caf\udcc3\udca9' holds bytes that are not text in the locale '"
    )
    assert wrong_text(UNDECODED).endswith("(set PYTHONUTF8=1) or in a locale such as LC_ALL=C.UTF-8")


S = ps.Source(prompt="The {a} Eiffel", layer=1)
T = ps.Target(prompt="The city")
ROWS = [{"a": "x"}] * 9


def fit(kind, model, data=ROWS, **options):
    return ps.fit(kind, model=model, data=data, **options)


PLACES = {
    "a prompt": lambda _, text: ps.Source(prompt=text),
    "a chat": lambda _, text: ps.Source(prompt=[{"role": "user", "content": text}]),
    "a subtracted prompt": lambda _, text: ps.Source(prompt="x", minus=text),
    "several prompts": lambda _, text: ps.Target(prompts=["x", text]),
    "a position": lambda _, text: ps.Source(prompt="x", position={"each": [text]}),
    "a position of its own": lambda _, text: ps.Each([text]),
    "a choice": lambda _, text: ps.Choices(["x", text]),
    "a reference": lambda _, text: ps.NextToken(reference=text),
    "a stop": lambda _, text: ps.Generate(stop=text),
    "a recipe": lambda _, text: ps.Recipe(name="a", title=text, source=S),
    "a data row": lambda model, text: ps.run(
        ps.Patchscope(source=S, target=T), model=model, data=[{"a": text}]
    ),
    "a quick look": lambda model, text: ps.explain(text, model=model),
    "a text of a fit": lambda model, text: fit("tuned_lens", model, [{"a": text}] * 9, column="a"),
    "an option of a fit": lambda model, text: fit("trained_scale", model, source=S, target=T, text=text),
    "a relation": lambda model, text: fit("lre", model, prompt=f"{{a}} {text}", subject="a"),
}


@pytest.mark.parametrize("text", [HALF, UNDECODED], ids=["half", "undecoded"])
@pytest.mark.parametrize("place", PLACES)
def test_it_is_refused_wherever_it_comes_from(tiny_model, place, text):
    with pytest.raises(InputError) as caught:
        PLACES[place](tiny_model(), text)
    assert ("half a character" if text is HALF else "not text in the locale") in str(caught.value)


def test_a_data_file_and_a_recipe_file(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": "x"}\n{"a": "The \\ud83d city"}\n')
    recipe = tmp_path / "r.yaml"
    recipe.write_text('name: a\ndata: {file: rows.jsonl}\nsource: {prompt: "{a}"}\n')
    with pytest.raises(InputError) as caught:
        ps.run(recipe, model=tiny_model())
    assert str(caught.value) == (
        rf"data.file='rows.jsonl', line 2: the column 'a': 'The \ud83d city' {HOLDS}. Correct the data."
    )
    (problem,) = lint(recipe)
    assert HOLDS in problem.message


def test_the_command_line_names_the_locale_and_the_way_out(folder):
    def explain(**variables):
        variables = {**os.environ, "LC_ALL": "C", **variables}
        words = ["explain", "Café".encode(), "--model", str(folder), "--layer", "1"]
        command = [sys.executable, "-m", "patchscope_nn", *words]
        return subprocess.run(command, env=variables, capture_output=True, check=False)

    done = explain(PYTHONUTF8="0")
    assert done.returncode == 2
    assert done.stdout == b""
    said = done.stderr.decode()
    assert said.startswith(r"error: 'Caf\udcc3\udca9' holds bytes that are not text in the locale 'C' (")
    assert "set PYTHONUTF8=1" in said
    # Decoded, the prompt is read; the description prompt is too long for so tiny a model.
    assert "reads at most" in explain(PYTHONUTF8="1").stderr.decode()


def test_what_a_terminal_cannot_print_is_escaped(tmp_path):
    (tmp_path / "r.yaml").write_text("name: é\nsource: {prompt: x}\n", encoding="utf-8")
    variables = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "patchscope_nn", "lint", str(tmp_path / "r.yaml")]
    done = subprocess.run(command, env=variables, capture_output=True, check=False)
    assert done.returncode == 2
    assert rb"name: '\xe9' is not a valid recipe name" in done.stdout
