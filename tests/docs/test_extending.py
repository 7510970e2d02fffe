"""The worked examples of docs/extending are run, block after block, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "extending"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: A part of what each page's example prints.
PRINTED = {"metric": ["words", "unpatched"], "mapping": ["reversed_units"], "data": ["The Colosseum"]}


@pytest.mark.parametrize("name", PRINTED)
def test_the_example_of_a_page_runs(name, tiny_model, registries, capsys):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    names = {"MODEL": tiny_model(), "__name__": f"page_{name}"}
    for block in BLOCK.findall(text):
        exec(compile(block, f"{name}.md", "exec"), names)  # noqa: S102 (the page's own code)
    assert names["run"].table()["error"].isna().all()
    printed = capsys.readouterr().out
    assert all(part in printed for part in PRINTED[name])
