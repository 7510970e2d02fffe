"""Shards of a run: how it is divided, shards as processes, and what merges and what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from commands import Done, caller
from growth import ROWS, grow, ran, same, scope_of
from hypothesis import given
from hypothesis import strategies as st

import patchscope_nn as ps
from patchscope_nn.errors import FolderError, InputError
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.runs.shards import Shard


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.data())
def test_shards_divide_the_cells_between_entries(sizes, data):
    starts = np.cumsum([0, *sizes])
    total = data.draw(st.integers(1, len(sizes)))
    shards = [Shard(number, total).cells(starts) for number in range(1, total + 1)]
    assert [number for shard in shards for number in shard] == list(range(starts[-1]))
    assert all(len(shard) for shard in shards)
    assert {shard.start for shard in shards} <= {*starts.tolist()}
    if len({*sizes}) == 1:
        counts = [len(shard) // sizes[0] for shard in shards]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "3", "3/", "-1/4", "a/b", (0, 4), (5, 4), "1/0"])
def test_a_wrong_shard_is_bad_input(wrong, tiny_model):
    with pytest.raises(InputError, match=r"is not a shard\. Give k/n with k from 1 to n, for example 3/16"):
        grow(tiny_model(), shard=wrong)


def test_more_shards_than_rows_are_bad_input(tiny_model):
    with pytest.raises(
        InputError, match=r"divides 6 data rows and target prompts into 7 .* at most 6 shards"
    ):
        grow(tiny_model(), shard="1/7")


def test_shards_are_parts_of_the_whole_and_merge_to_it(tiny_model, tmp_path):
    model, controls = tiny_model(), ["unpatched", "random", "shuffled"]
    whole = grow(model, controls=controls)
    table = whole.table()
    shards = [
        grow(model, controls=controls, shard=(number, 4), out=tmp_path / f"{number}")
        for number in range(1, 5)
    ]
    assert [len(shard.rows) for shard in shards] == [26, 13, 26, 13]
    assert [shard.manifest["n_rows"] for shard in shards] == [2, 1, 2, 1]
    assert [shard.manifest["shard"] for shard in shards] == ["1/4", "2/4", "3/4", "4/4"]
    start = 0
    for shard in shards:
        own = table.iloc[start : start + len(shard.rows)].reset_index(drop=True)
        pd.testing.assert_frame_equal(shard.table(), own, atol=1e-6, check_dtype=False)
        start += len(shard.rows)
    merged = ps.merge([shard.path for shard in shards[::-1]], out=tmp_path / "whole")
    assert same(merged, whole)
    assert merged.manifest["hash"] == whole.manifest["hash"]
    assert (merged.manifest["n_rows"], merged.manifest["n_cells"]) == (6, 78)
    assert "shard" not in merged.manifest
    assert [piece["shard"] for piece in merged.manifest["merged"]] == ["4/4", "3/4", "2/4", "1/4"]
    assert sum(ran(merged)) == 78
    assert (tmp_path / "whole/report.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "4", "whole"]
    again = grow(model, controls=controls, out=tmp_path / "whole")
    assert sum(ran(again)) == 78
    assert same(again, whole)


def test_a_merged_run_grows(tiny_model, tmp_path):
    model = tiny_model()
    for number in (1, 2):
        grow(model, limit=4, shard=f"{number}/2", out=tmp_path / f"{number}")
    ps.merge([tmp_path / "1", tmp_path / "2"], out=tmp_path / "whole")
    grown = grow(model, out=tmp_path / "whole")
    assert ran(grown) == [18, 18, 18]
    assert same(grown, grow(model))


def test_more_rows_in_shards_take_what_is_finished(tiny_model, tmp_path):
    """With more rows a shard has other rows; its cells come from any folder that has them."""
    model = tiny_model()
    old = [grow(model, limit=3, shard=(number, 3), out=tmp_path / f"old{number}") for number in (1, 2, 3)]
    with pytest.raises(FolderError, match="has 9 finished cells that are not part of this run"):
        grow(model, shard=(2, 3), out=tmp_path / "old2")
    reuse = [shard.path for shard in old]
    new = [grow(model, shard=(number, 3), out=tmp_path / f"new{number}", reuse=reuse) for number in (1, 2, 3)]
    assert [ran(shard) for shard in new] == [[0], [9], [18]]
    assert same(ps.merge([shard.path for shard in new], out=tmp_path / "whole"), grow(model))


def test_a_shard_becomes_the_whole_run_and_not_the_other_way_round(tiny_model, tmp_path):
    model, out = tiny_model(), tmp_path / "run"
    grow(model, shard="2/3", out=out)
    whole = grow(model, out=out)
    assert ran(whole) == [18, 36]
    assert "shard" not in whole.manifest
    assert same(whole, grow(model))
    with pytest.raises(FolderError, match=r"has 36 finished cells that are not .* or another shard"):
        grow(model, shard="2/3", out=out)


def test_an_interrupted_shard_goes_on(tiny_model, tmp_path):
    seen = []

    def stop(*step):
        seen.append(step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    model, out = tiny_model(), tmp_path / "run"
    # Without a second thread, which would finish the step that is running.
    used = ps.Optimisations(overlap=False)
    with pytest.raises(KeyboardInterrupt):
        grow(model, shard="2/2", out=out, progress=stop, max_rows=1, optimisations=used)
    done, total = seen[-1]
    assert total == 27
    with pytest.raises(
        FolderError, match=rf"run is not finished: it has {done} of 27 cells\. Finish it first"
    ):
        ps.merge([out], out=tmp_path / "whole")
    rest = grow(model, shard="2/2", out=out)
    assert ran(rest) == [27 - done]


@pytest.fixture
def two(tiny_model, tmp_path):
    """The two shards of a run, and what joins folders."""
    for number in (1, 2):
        grow(tiny_model(), shard=(number, 2), out=tmp_path / f"{number}")

    def merge(*names):
        return ps.merge([tmp_path / name for name in names], out=tmp_path / "whole")

    return merge


def test_a_missing_or_doubled_shard_is_refused(two, tiny_model, tmp_path):
    with pytest.raises(FolderError, match=r"1 of 2 shards are missing: 2\. Run them with --shard"):
        two("1")
    with pytest.raises(FolderError, match=r"/1 and \S+/1 are both shard 1/2\. Leave one of them out"):
        two("1", "2", "1")
    grow(tiny_model(), out=tmp_path / "all")
    with pytest.raises(FolderError, match=r"/all is a whole run, and \S+/1 is shard 1/2 of one"):
        two("1", "2", "all")
    grow(tiny_model(), shard="2/3", out=tmp_path / "third")
    with pytest.raises(
        FolderError, match=r"1 is one of 2 shards of run \w+, and \S+third is one of 3 shards"
    ):
        two("1", "third")
    grow(tiny_model(), shard="2/2", limit=4, out=tmp_path / "fewer")
    with pytest.raises(FolderError, match="Shards belong together if recipe, data"):
        two("1", "fewer")
    grow(tiny_model(), shard="2/2", seed=5, out=tmp_path / "seeded")
    with pytest.raises(
        FolderError, match=r"/1 holds cells of another run: its seed is 0, and this run's is 5"
    ):
        two("1", "seeded")
    assert not (tmp_path / "whole").exists()
    assert not [*tmp_path.glob(".*partial")]


def test_a_folder_with_something_in_it_is_not_merged_into(two, tmp_path):
    with pytest.raises(FolderError, match="/1 is not empty"):
        ps.merge([tmp_path / "1", tmp_path / "2"], out=tmp_path / "1")
    with pytest.raises(InputError, match="there are no runs to merge"):
        two()
    with pytest.raises(FolderError, match="is not the folder of a run"):
        two("1", "nowhere")


def test_runs_over_other_data_rows_merge(tiny_model, tmp_path):
    model = tiny_model()
    whole = grow(model)
    for name, rows in (("a", ROWS[:2]), ("b", ROWS[2:5]), ("c", ROWS[5:])):
        grow(model, data=rows, out=tmp_path / name)
    merged = ps.merge([tmp_path / "a", tmp_path / "b", tmp_path / "c"], out=tmp_path / "whole")
    assert same(merged, whole)
    assert merged.manifest["n_rows"] == 6
    pd.testing.assert_frame_equal(merged.summary(), whole.summary(), atol=1e-6)
    grown = grow(model, out=tmp_path / "whole", controls=["unpatched", "random", "shuffled"])
    assert ran(grown) == [18, 27, 9, 24]
    assert same(grown, grow(model, controls=["unpatched", "random", "shuffled"]))


def test_runs_with_a_cell_in_common_or_other_layers_do_not_merge(tiny_model, tmp_path):
    model = tiny_model()
    grow(model, data=ROWS[:3], out=tmp_path / "a")
    grow(model, data=ROWS[2:], out=tmp_path / "b")
    grow(model, data=ROWS[3:], out=tmp_path / "c", scope=scope_of(layer=[0]))
    with pytest.raises(FolderError, match=r"9 cells are in two of the runs, the first .* in \S+/a and \S+/b"):
        ps.merge([tmp_path / "a", tmp_path / "b"], out=tmp_path / "whole")
    with pytest.raises(FolderError, match=r"are runs with different source: .*with --reuse for each"):
        ps.merge([tmp_path / "a", tmp_path / "c"], out=tmp_path / "whole")
    with pytest.raises(FolderError, match="is a single whole run"):
        ps.merge([tmp_path / "a"], out=tmp_path / "whole")


def test_a_probe_is_trained_when_shards_are_merged(tiny_model, tmp_path):
    pytest.importorskip("sklearn")
    recipe = ps.Recipe(
        name="probed",
        source={"prompt": "{text}", "layer": [1, 2]},
        readout="hidden",
        probe={"label": "label", "folds": 2},
    )
    rows = [{**row, "label": "ab"[number % 2]} for number, row in enumerate(ROWS)]
    asked = {"model": tiny_model(), "data": rows}
    for number in (1, 2):
        shard = ps.run(recipe, shard=(number, 2), out=tmp_path / f"{number}", **asked)
        assert "probe_choice" not in shard.table()
        assert shard.metrics == []
    merged = ps.merge([tmp_path / "1", tmp_path / "2"], out=tmp_path / "whole")
    whole = ps.run(recipe, **asked)
    assert same(merged, whole)
    assert merged.metrics == whole.metrics


RECIPE = """\
name: methods
model: model
data: {rows: [{text: The Eiffel Tower}, {text: Paris}, {text: Diana is in Paris}, {text: The city}]}
source: {prompt: "{text}"}
target: {prompt: "The city -> "}
readout: {next_token: {top_k: 2, reference: source}}
metrics: [nll_nats, precision_at_1]
controls: [unpatched, random, shuffled]
methods:
  token identity:
  two prompts: {target: {prompt: null, prompts: ["The city -> ", "Paris -> "]}}
"""


def command(*words, folder):
    main = [sys.executable, "-m", "patchscope_nn"]
    return subprocess.Popen(
        [*main, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_four_shards_as_commands_are_the_whole(tmp_path, monkeypatch, capsys):
    """As on a cluster: each command knows only its number, two run at once, and one joins what they wrote."""
    tiny.make_module("llama").save_pretrained(tmp_path / "model")
    tiny.TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "methods.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    here = caller(monkeypatch, capsys)
    words = [("run", "methods.yaml", "--shard", f"{number}/4", "--json") for number in range(1, 5)]
    processes = [command(*shard, folder=tmp_path) for shard in words[:2]]
    ended = [here(*shard) for shard in words[2:]]
    for process in reversed(processes):
        printed = process.communicate(timeout=300)
        ended.insert(0, Done(process.returncode, *printed))
    folders = []
    for number, shard in enumerate(ended, start=1):
        assert shard.returncode == 0, shard.stderr
        folders.append(json.loads(shard.stdout)["folder"])
        assert folders[-1].endswith(f"-shard-{number}-of-4")
    merging = here("merge", "runs/whole", *folders)
    assert merging.returncode == 0, merging.stderr
    assert "of 2 methods in runs/whole" in merging.stdout
    from patchscope_nn.runs.experiments import open_finished

    merged = open_finished(tmp_path / "runs/whole")
    whole = ps.run(ps.load_recipe(tmp_path / "methods.yaml"), base=tmp_path, model=str(tmp_path / "model"))
    assert list(merged) == list(whole) == ["token identity", "two prompts"]
    for name, run in merged.items():
        table = whole[name].table().assign(source_model="model", target_model="model")
        pd.testing.assert_frame_equal(run.table(), table, atol=1e-6, rtol=3e-6)
        assert (tmp_path / "runs/whole" / run.path.name / "report.html").is_file()
    assert [len(run.rows) for run in merged.values()] == [52, 104]
    pd.testing.assert_frame_equal(merged.compare().means, whole.compare().means, atol=1e-5)
    assert (tmp_path / "runs/whole/comparison.html").is_file()


def test_the_plan_of_a_shard_has_its_cells(tiny_model):
    from patchscope_nn.runs.execute import plan_run

    plans = [
        plan_run(prepare(scope_of(), model=tiny_model(), data=ROWS, shard=shard).only)
        for shard in (None, "1/2", "2/2")
    ]
    assert [plan.n_cells for plan in plans] == [24, 12, 12]


def test_the_shards_of_a_run_are_named_by_their_number(tiny_model):
    names = [
        prepare(scope_of(), model=tiny_model(), data=ROWS, shard=shard).default_folder
        for shard in (None, "2/3")
    ]
    assert names[1] == Path(f"{names[0]}-shard-2-of-3")
