"""The example package, installed: what it brings is found by name, and is shown wherever ours is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from patchscope_nn.recipe import lint
from patchscope_nn.runs.experiments import open_finished

EXAMPLE = Path(__file__).parents[1] / "example_package"
METRIC = "repeated_words"
RECIPE = """
name: plugins
data: {reader: cities, arguments: {n: 4}}
source: {prompt: "{text}", position: -1, layer: [0, 2]}
target: {prompt: The city x, position: x}
readout: {generate: {max_new_tokens: 6}}
columns: [first_word]
metrics: [repeated_words]
controls: [unpatched, random]
methods:
  plain: {}
  halved: {mapping: halved}
"""
#: A readout and a site of the package.
KINDS = """
name: kinds
source: {prompt: The city, layer: 1, site: gate}
target: {prompt: The city x, position: x, site: gate}
readout: logit_gap
"""


class Session:
    """Commands where the example package is installed."""

    def __init__(self, folder):
        self.folder, self.site = folder, folder / "site"
        source = folder / "source"  # building leaves files beside what it builds
        shutil.copytree(EXAMPLE, source)
        options = [
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--disable-pip-version-check",
        ]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(self.site), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        (folder / "plugins.yaml").write_text(RECIPE)

    def __call__(self, *words):
        path = [str(self.site), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "COLUMNS": "160"}
        command = [sys.executable, "-m", "patchscope_nn", *words]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return Session(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(scope="module")
def ran(session, folder):
    done = session("run", "plugins.yaml", "--model", str(folder), "--out", "out")
    assert done.returncode == 0, done.stderr
    return done


def test_lint_knows_its_names(session):
    (session.folder / "wrong.yaml").write_text(RECIPE.replace("[repeated_words]", "[repeated_word]"))
    (session.folder / "kinds.yaml").write_text(KINDS)
    *right, wrong = session("lint", "plugins.yaml", "kinds.yaml", "wrong.yaml").stdout.splitlines()
    assert right == ["plugins.yaml: ok", "kinds.yaml: ok"]
    assert "'repeated_word' is not a known metric. Did you mean 'repeated_words'? Allowed: precision" in wrong


def test_without_the_package_its_names_are_unknown(session):
    found = "\n".join(map(str, lint(session.folder / "plugins.yaml")))
    assert "'repeated_words' is not a known metric" in found
    assert "'cities' is not a known reader" in found


def test_the_terminal_shows_it_with_its_controls_and_intervals(ran):
    assert METRIC in ran.stdout
    assert "random" in ran.stdout
    assert "[0." in ran.stdout


def test_the_table_holds_it(session, ran):
    table = pd.read_parquet(session.folder / "out" / "halved" / "cells.parquet")
    assert table["error"].isna().all()
    assert set(table["mapping"]) == {"halved"}
    assert table["row"].nunique() == 4
    texts = table["text"].str.lower().str.split()
    expected = [1 - len(set(words)) / len(words) if words else None for words in texts]
    assert list(table[METRIC].astype(object).where(table[METRIC].notna(), None)) == expected
    assert list(table["first_word"]) == [text.split()[0] if text.split() else None for text in table["text"]]


def test_report_and_comparison_show_it_where_the_package_is_not_installed(session, ran):
    experiment = open_finished(session.folder / "out")
    page = experiment["plain"].report().read_text()
    assert "Share of words that were said before" in page.replace("\\u003cbr\\u003e", " ")
    assert f"Mean {METRIC} is lowest at source layer" in page
    assert "controls at the same place: random" in page
    assert '"label":"first word"' in page
    compared = experiment.compare()
    assert compared.metrics == (METRIC,)
    assert set(compared.means["control"]) == {"patched", "unpatched", "random"}
    assert compared.means["low"].notna().all()
    assert compared.differences["p"].notna().all()
    assert METRIC in experiment.report().read_text()


def test_the_doctor_lists_what_packages_bring_and_what_is_wrong_with_it(session):
    done = session("doctor", "--json")
    found = {
        line["found"].partition(",")[0]: line
        for line in json.loads(done.stdout)
        if "of patchscope-example" in line["found"]
    }
    assert {name: line["state"] for name, line in found.items()} == {
        METRIC: "ok",
        "broken": "wrong",
        "first_word": "ok",
        "cities": "ok",
        "halved": "ok",
        "logit_gap": "ok",
        "gate": "ok",
    }
    assert "ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in found["broken"]["found"]
