"""Cells that are taken from other runs instead of computed."""

from __future__ import annotations

import pandas as pd
import pytest
from growth import ROWS, grow, ran, same, scope_of

import patchscope_nn as ps
from patchscope_nn.errors import FolderError, InputError


def test_finished_cells_of_other_runs_are_taken(tiny_model, tmp_path):
    model = tiny_model()
    first = grow(model, out=tmp_path / "first", data=ROWS[4:1:-1])
    second = grow(model, out=tmp_path / "second", scope=scope_of(layer=[3, 0]), controls=["random"])
    reuse = [tmp_path / "first", str(tmp_path / "second")]
    run = grow(model, out=tmp_path / "run", reuse=reuse)
    taken = {str(first.path): 3 * 9, str(second.path): 3 * 4}
    assert run.manifest["sessions"][-1]["reused"] == taken
    assert ran(run) == [6 * 9 - sum(taken.values())]
    assert same(run, grow(model))
    assert same(first, grow(model, data=ROWS[4:1:-1]))
    in_memory = grow(model, reuse=reuse)
    assert same(in_memory, run)
    assert in_memory.manifest["sessions"][-1]["reused"] == taken


def test_a_smaller_run_is_taken_whole_and_computes_nothing(tiny_model, tmp_path):
    model = tiny_model()
    grow(model, out=tmp_path / "large")
    small = grow(model, out=tmp_path / "small", limit=2, reuse=[tmp_path / "large"])
    assert ran(small) == [0]
    assert small.manifest["state"] == "finished"
    assert same(small, grow(model, limit=2))


def test_cells_are_taken_from_an_unfinished_run(tiny_model, tmp_path):
    def stop(done, _):
        if done >= 10:
            raise KeyboardInterrupt

    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        grow(model, out=tmp_path / "stopped", progress=stop, max_rows=1)
    n_done = len(ps.load_run(tmp_path / "stopped").rows)
    assert 10 <= n_done < 54
    run = grow(model, out=tmp_path / "run", reuse=[tmp_path / "stopped"])
    assert ran(run) == [54 - n_done]
    assert same(run, grow(model))


def test_the_cells_of_another_run_are_refused_with_both_values(tiny_model, tmp_path):
    grow(tiny_model(), out=tmp_path / "seeded", seed=1)
    message = (
        r"seeded holds cells of another run: its seed is 1, and this run's is 0\. Leave it out of --reuse"
    )
    with pytest.raises(FolderError, match=message):
        grow(tiny_model(), out=tmp_path / "run", reuse=[tmp_path / "seeded"])
    with pytest.raises(FolderError, match="is not the folder of a run"):
        grow(tiny_model(), out=tmp_path / "run", reuse=[tmp_path])
    with pytest.raises(InputError, match="reuse"):
        grow(tiny_model(), out=tmp_path / "run", reuse=3)


def test_each_method_takes_its_own_cells(tiny_model, tmp_path):
    recipe = ps.Recipe(
        name="two",
        source={"prompt": "{text}"},
        target={"prompt": "The city -> "},
        readout={"next_token": {"reference": "source"}},
        metrics=["nll_nats"],
        methods={"near": {}, "far": {"target.layer": -1}},
    )
    given = {"model": tiny_model(), "base": tmp_path}
    ps.run(recipe, data=ROWS[:2], out=tmp_path / "small", **given)
    both = ps.run(recipe, data=ROWS, out=tmp_path / "large", reuse=[tmp_path / "small"], **given)
    assert [ran(run) for run in both.values()] == [[4 * 4], [4 * 4]]
    whole = ps.run(recipe, data=ROWS, **given)
    pd.testing.assert_frame_equal(both.compare().means, whole.compare().means, atol=1e-6)
    grow(given["model"], out=tmp_path / "one")
    with pytest.raises(FolderError, match="one has no folder of a method of this recipe: near, far"):
        ps.run(recipe, data=ROWS, out=tmp_path / "other", reuse=[tmp_path / "one"], **given)
