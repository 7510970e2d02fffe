"""What README shows is run: its Python, its YAML, and every command it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

import patchscope_nn as ps
from patchscope_nn.cli import app
from patchscope_nn.models import builtin
from patchscope_nn.recipe import lint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README": README, "recipes": (ROOT / "recipes/README.md").read_text(encoding="utf-8")}


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    line: int


def fenced(page):
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2], page[: found.start()].count("\n") + 2)


def blocks(language):
    found = [one for one in fenced(README) if one.language == language]
    assert found, f"README has no {language} block"
    return pytest.mark.parametrize("block", found, ids=lambda block: f"line {block.line}")


@pytest.fixture(scope="module")
def model():
    if builtin.weights_file() is None:
        pytest.skip(f"the builtin weights are absent: {builtin.INSTALL}")
    return ps.load(builtin.NAME)


def written(block, folder):
    name = re.search(r"^name: (.*)$", block.text, flags=re.MULTILINE)[1]
    path = folder / f"{name}.yaml"
    path.write_text(block.text, encoding="utf-8")
    return path


@pytest.mark.real
@blocks("python")
@pytest.mark.usefixtures("model", "registries")
def test_python(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, f"README.md, line {block.line}", "exec"), {})  # noqa: S102 (README's own code)
    printed = capsys.readouterr().out
    assert "unpatched" in printed
    assert "British" in printed or "Wales" in printed


@blocks("yaml")
def test_yaml_is_a_recipe(block, tmp_path):
    assert lint(written(block, tmp_path)) == []


@pytest.mark.real
@blocks("yaml")
def test_yaml_runs(block, model, tmp_path):
    run = ps.run(written(block, tmp_path), model=model, limit=2, out=tmp_path / "run")
    table = run.table()
    last = table[table.control.isna() & (table.source_layer == model.info.n_layers - 1)]
    assert len(last) == 2
    assert table["error"].isna().all()
    assert (tmp_path / "run/report.html").is_file()


def commands(page):
    """Every `patchscope ...` between backticks."""
    return [shlex.split(found) for found in re.findall(r"`patchscope ([^`]+)`", page)]


@pytest.mark.parametrize(
    "words", [words for page in PAGES.values() for words in commands(page)], ids=" ".join
)
def test_a_command_is_one(words):
    """Its words are parsed as they would be, up to where the command begins to work."""
    group = typer.main.get_command(app)
    context = group.make_context("patchscope", words)
    name, command, rest = group.resolve_command(context, words)
    command.make_context(name, rest, parent=context)


def test_every_command_is_shown():
    shown = {words[0] for words in commands(README)}
    assert shown == set(typer.main.get_command(app).commands)


def test_every_file_and_recipe_that_is_named_is_there():
    for page in PAGES.values():
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", page):
            assert (ROOT / link).is_file(), link
        for _, recipe in (words[:2] for words in commands(page) if words[0] == "run"):
            assert recipe in PAGES["recipes"] or f"name: {Path(recipe).stem}\n" in README


@pytest.mark.real
def test_the_table_of_explain_is_laid_out_so(model, monkeypatch, capsys):
    """Its words are the model's, and near ties fall by rounding; what stands around them does not."""
    (block,) = (one for one in fenced(README) if one.language == "text")
    header, *lines = block.text.splitlines()
    names = [line.split()[0] for line in lines]
    words = next(words for words in commands(README) if words[0] == "explain")
    layers = f"[{', '.join(names[1:])}]"
    monkeypatch.setattr("patchscope_nn.runs.loading.load", lambda *_, **__: model)
    app(["explain", *words[1:], "--layer", layers, "--max-new-tokens", "2"], standalone_mode=False)
    _, _, printed, *rows = capsys.readouterr().out.splitlines()
    assert printed.split() == header.split()
    assert [row.split()[0] for row in rows] == names
