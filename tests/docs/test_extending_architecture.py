"""The worked example of docs/extending/architecture.md."""

from __future__ import annotations

import re
from pathlib import Path

import hooks
import pytest
import tiny

import patchscope_nn as ps
from patchscope_nn.spec import SITES

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "architecture.md"


def test_a_part_of_another_name_is_found_once_the_name_is_known(monkeypatch, run_cells):
    monkeypatch.setitem(SITES, "mlp", SITES["mlp"])  # put back afterwards
    example = {}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), example)  # noqa: S102 (the page's own example)
    scope = ps.Patchscope(
        source=ps.Source(prompt="The Eiffel Tower", layer=[0, 2], site="mlp"),
        target=ps.Target(prompt="The city of x is", position="x", layer=1, site="mlp"),
        readout=ps.NextToken(top_k=3),
    )
    module = example["with_own_blocks"](tiny.make_module("llama"))
    unknown = ps.load(module, tokenizer=tiny.TOKENIZER, proof=False)
    with pytest.raises(ps.InputError, match="mlp"):
        ps.run(scope, model=unknown)
    example["make_it_known"]()
    known = ps.load(module, tokenizer=tiny.TOKENIZER)
    pair = hooks.Pair(scope, tiny.reference("llama"), tokenizer=tiny.TOKENIZER)
    for cell, given in run_cells(scope, known):
        hooks.assert_same(given, pair.expected(cell, {}))
