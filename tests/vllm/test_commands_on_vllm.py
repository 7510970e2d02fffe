"""One recipe file, from the command line: in this process, on vLLM, and on a server; and with two models."""

from __future__ import annotations

import os
import subprocess
import sys

import on_cpu
import pytest
import serving
import tiny
from one_table import assert_one_table

import patchscope_nn as ps
from patchscope_nn.errors import ModelError
from patchscope_nn.models import builtin

FEW = ("--limit", "2", "--set", "source.layer=[3, 12]", "--dtype", "float32", "--no-report")
ENGINE = ("--engine", "vllm", "--engine-args", "max_model_len=2048")


def patchscope(*words, expects=0):
    done = subprocess.run(
        [sys.executable, on_cpu.__file__, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(serving.ROOT)},
        timeout=500,
    )
    assert done.returncode == expects, done.stderr[-3000:]
    return done


def table(folder):
    return ps.load_run(folder).table()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The table of the recipe on transformers."""
    folder = tmp_path_factory.mktemp("here") / "run"
    patchscope("run", "entity-description", *FEW, "--out", folder)
    return table(folder)


@pytest.mark.parametrize("size", [1, 3])
def test_a_recipe_on_one_rank_or_on_three(size, expected, tmp_path):
    """A tensor-parallel size divides the number of heads, 9."""
    ranks = ("--engine-args", f"tensor_parallel_size={size}")
    patchscope("run", "entity-description", *FEW, *ENGINE, *ranks, "--out", tmp_path / "run")
    assert_one_table(table(tmp_path / "run"), expected)


def test_a_small_model_here_and_a_larger_one_on_vllm(here, tmp_path):
    """Through an affine mapping that is fitted first."""
    small = tmp_path / "small"
    tiny.make_module("llama", vocab_size=len(here.tokenizer)).save_pretrained(small)
    here.tokenizer.save_pretrained(small)
    words = ("--source-model", small, "--target-model", builtin.NAME, "--limit", "2", "--dtype", "float32")
    fit = ("--set", "source.layer=[1, 2]", "--set", "target.layer=[4, 20]", "--set", "mapping.fit.limit=20")
    runs = {"here": (), "vllm": (*ENGINE, "--source-engine", "transformers")}
    for name, engine in runs.items():
        out = tmp_path / name
        patchscope("run", "cross-model-next-token", *words, *fit, *engine, "--no-report", "--out", out)
    methods = [path.parent.name for path in (tmp_path / "here").glob("*/manifest.json")]
    assert len(methods) == 3
    for method in methods:
        assert_one_table(*(table(tmp_path / name / method) for name in ("vllm", "here")))


def test_pipeline_parallel_is_refused():
    with pytest.raises(ModelError, match=r"pipeline_parallel_size=2 .* Leave pipeline_parallel_size out"):
        ps.load(builtin.NAME, engine="vllm", pipeline_parallel_size=2)
