"""The tutorial runs as it stands, and what is committed of it is what it gives."""

import re
from pathlib import Path
from typing import Any

import pytest

from patchscope_nn.models import builtin

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def shown(cell: Any) -> list[tuple[str, ...]]:
    """The kinds of a cell's outputs."""
    return [(one["output_type"], *sorted(one.get("data", {}))) for one in cell.outputs]


def runs(cell: Any) -> list[str]:
    """The hashes of the runs that a cell shows: of recipe, data, models and mapping."""
    plain = "".join(one.get("data", {}).get("text/plain", "") for one in cell.outputs)
    return re.findall(r"<Run \S+ ([0-9a-f]{16})", plain)


def test_what_is_committed_is_small_executed_and_of_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == number for number, cell in enumerate(code, start=1))
    assert not [one for cell in code for one in cell.outputs if one["output_type"] == "error"]
    assert not [one for cell in code for one in cell.outputs if one.get("name") == "stderr"]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 500_000
    assert "<script" not in text
    assert not re.search(r"(/home|/root|/work|/tmp|site-packages)/", text)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # of the notebook's client and its kernel, not of ours
def test_it_runs_and_gives_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if builtin.weights_file() is None:
        pytest.skip(f"the builtin weights are absent: {builtin.INSTALL}")
    nbclient = pytest.importorskip("nbclient")
    committed = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3", resources=resources).execute()
    for old, new in zip(committed.cells, fresh.cells, strict=True):
        if old.cell_type == "code":
            assert shown(new) == shown(old), old.source
            assert runs(new) == runs(old), "the tutorial shows older runs: execute it again"
    (said,) = (
        cell.outputs[0]["data"]["text/html"] for cell in fresh.cells if cell.source.startswith("scope = ")
    )
    assert "City in the United States" in said  # New York City, as the model itself says it at layer 12
