"""The worked example of docs/extending/engine.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import patchscope_nn as ps
from patchscope_nn.engines import ENGINES

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "engine.md"


@pytest.fixture
def example():
    names = {}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102 (the page's own example)
    yield names
    del ENGINES["counting"]


def test_the_example_counts_the_steps_and_gives_the_same_cells(example, tiny_model):
    scope = ps.Patchscope(
        source=ps.Source(prompt="The Eiffel Tower", layer=[0, 2]),
        target=ps.Target(prompt="The city of x is", position="x", layer="all"),
        readout=ps.NextToken(top_k=3),
    )
    model = tiny_model()
    counted = ps.run(scope, model=example["counted"](model), max_rows=2)
    assert ENGINES["counting"].steps > 0
    usual = ps.run(scope, model=model, max_rows=2)
    assert [row["top_ids"] for row in counted.rows] == [row["top_ids"] for row in usual.rows]
