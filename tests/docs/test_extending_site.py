"""docs/extending/site.md is run: its Python, its YAML, and the same in the rehearsal of a server."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import hooks
import pytest
import tiny

import patchscope_nn as ps
from patchscope_nn.recipe import json_schema, lint
from patchscope_nn.spec import SITES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending/site.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def names(monkeypatch):
    """What the page's first block defines; the site is registered until the test ends."""
    monkeypatch.setitem(SITES, "gate", None)
    del SITES["gate"]
    defined = {}
    exec(blocks("python")[0], defined)  # noqa: S102 (the page's own code)
    return defined


def load():
    return ps.load(tiny.make_module("llama"), tokenizer=tiny.TOKENIZER)


def expected_states():
    """The outputs of `mlp.gate_proj` at the last token of the source prompt, by layer, by plain hooks."""
    ids = tuple(tiny.TOKENIZER("The city of Paris")["input_ids"])
    reference = tiny.reference("llama")
    return {
        layer: reference.state(ids, hooks.Site(layer, "mlp.gate_proj"), [-1])[0].tolist() for layer in (0, 2)
    }


def check(table):
    expected = expected_states()
    assert len(table) == 4
    for cell in table.itertuples():
        assert cell.hidden[0] == pytest.approx(expected[cell.source_layer], abs=1e-4)


@pytest.mark.parametrize("remote", [False, "local"])
def test_the_page_runs(names, remote, tmp_path):
    names["model"] = load()
    exec(blocks("python")[1], names)  # noqa: S102 (the page's own code)
    check(names["run"].table())
    recipe = tmp_path / "gates.yaml"
    recipe.write_text(blocks("yaml")[0], encoding="utf-8")
    assert lint(recipe) == []
    run = ps.run(recipe, model=names["model"], remote=remote, out=tmp_path / "run")
    check(run.table())
    assert "Gates of MLPs of " in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    site = json_schema()["$defs"]["Source"]["properties"]["site"]
    assert site["enum"] == ["residual", "before", "attention", "mlp", "gate"]


def test_the_pages_check_runs(names):
    exec(blocks("python")[2], names)  # noqa: S102 (the page's own code)


def test_the_names_of_sites_stand_in_one_module():
    """A new site that ships touches its module and a test, because no other module compares names of sites.

    `before` is an English word, so it counts only where something is compared with it.
    """
    naming = set()
    for file in (ROOT / "patchscope_nn").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node] if isinstance(node, ast.Constant) and node.value != "before" else []
            names += [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if any(isinstance(name, ast.Constant) and name.value in [*SITES] for name in names):
                naming.add(str(file.relative_to(ROOT / "patchscope_nn")))
    assert naming == {"spec/sites.py"}
