"""A kind of readout is one file: no other room asks which kind it has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import patchscope_nn as ps
from patchscope_nn.spec import readout_kinds

PACKAGE = Path(ps.__file__).parent
KINDS = [kind for kind in readout_kinds().values() if kind.__module__.startswith("patchscope_nn.")]
CLASSES, NAMES = {kind.__name__ for kind in KINDS}, {kind.name for kind in KINDS}
#: The kinds themselves, and the proof, whose trials are of each kind that ships.
OWN = {"readouts", "proof"}
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).parts[0] not in OWN]


def switches(tree):
    """Where code asks which kind a readout is: by its class, or by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            named = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
            if named & CLASSES:
                yield node.lineno
        if isinstance(node, ast.Compare | ast.match_case | ast.Dict):
            asked = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node]
            asked = node.keys if isinstance(node, ast.Dict) else asked
            values = {
                part.value for one in asked if one for part in ast.walk(one) if isinstance(part, ast.Constant)
            }
            if {value for value in values if isinstance(value, str)} & (NAMES - {"hidden", "choices"}):
                yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_other_room_asks_which_kind_a_readout_is(file):
    found = list(switches(ast.parse(file.read_text(encoding="utf-8"))))
    assert found == [], f"{file.relative_to(PACKAGE)}: ask an attribute of spec.Readout instead"


def test_a_switch_is_found():
    for code in (
        "isinstance(readout, NextToken)",
        "isinstance(readout, Choices | Generate)",
        "readout.name == 'generate'",
        "readout.name in ('next_token', 'hidden')",
        "{'generate': 1}[readout.name]",
    ):
        assert list(switches(ast.parse(code))), code


def test_each_kind_that_ships_has_a_file_of_its_own():
    files = {file.stem for file in (PACKAGE / "readouts").glob("*.py")} - {"__init__"}
    assert files == NAMES
    assert {kind.__module__.rpartition(".")[2] for kind in KINDS} == files
