"""What the package says of itself: licence, Python versions, citation, hooks and issue forms."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import patchscope_nn as ps

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MINORS = [
    found[1]
    for name in PROJECT["classifiers"]
    if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", name))
]


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture
def check(monkeypatch):
    """The script behind `make test-package`."""
    folder = ROOT / "tests/package"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("package_check", folder / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("cpu_torch", None)


def test_the_licence_is_named_and_whole():
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    # With a licence expression, a licence classifier is an error (PEP 639).
    assert [name for name in PROJECT["classifiers"] if name.startswith("License ::")] == []
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert text.rstrip().endswith("limitations under the License.")


def test_classifiers_name_the_versions_that_are_supported():
    oldest = int(re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1])
    expected = [f"3.{minor}" for minor in range(oldest, oldest + len(MINORS))]
    assert expected == MINORS
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (Path(ps.__file__).parent / "py.typed").is_file()


def test_the_citation_is_of_this_version():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert {citation["version"], PROJECT["version"]} == {ps.__version__}
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert paper["url"].endswith("/2401.06102")


def test_hooks_are_the_commands_of_make_lint():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)[1]
    linters = [line.strip().lstrip("@").removeprefix("$(BIN)/") for line in commands.splitlines()]
    (local,) = read(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == linters
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in local["hooks"])


@pytest.mark.parametrize("name", ["bug", "question", "architecture"])
def test_an_issue_form_is_one(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    fields = [field["id"] for field in form["body"]]
    assert len(set(fields)) == len(fields)
    assert all(field["attributes"]["label"] for field in form["body"])
    labels = " ".join(field["attributes"]["label"] for field in form["body"])
    assert name == "question" or "patchscope doctor --model ID" in labels


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_targets_and_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_the_package_is_checked_on_every_supported_python(check):
    assert list(check.PYTHONS) == MINORS


def test_a_wheel_with_a_test_or_without_a_template_is_refused(check, capsys):
    names = [
        *(f"patchscope_nn/recipes/r{number}.yaml" for number in range(20)),
        "patchscope_nn/recipes/recipe.schema.json",
        *(f"patchscope_nn/data/d{number}.jsonl" for number in range(5)),
        "patchscope_nn/data/directions.safetensors",
        "patchscope_nn/templates/a.html.jinja",
        "patchscope_nn/templates/b.html.jinja",
        "patchscope_nn/explore/page/index.html",
        *(f"patchscope_nn/explore/page/p{number}.js" for number in range(8)),
        "patchscope_nn/__init__.pyi",
        "patchscope_nn/py.typed",
        "patchscope_nn-0.2.0.dist-info/licenses/LICENSE",
    ]
    check.check_wheel(names)
    with pytest.raises(check.CheckError, match="should leave out"):
        check.check_wheel([*names, "tests/test_cli.py"])
    with pytest.raises(check.CheckError, match="jinja"):
        check.check_wheel([name for name in names if not name.endswith("b.html.jinja")])
    assert "py\\.typed" in capsys.readouterr().out
