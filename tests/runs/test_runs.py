"""Runs: the folder, its resumption after a kill, and what is read back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import parts
import pytest
import tiny
import torch
from killed import PLACES, kill_at

import patchscope_nn as ps
from patchscope_nn import backends
from patchscope_nn.errors import FolderError
from patchscope_nn.runs.folder import open_folder
from patchscope_nn.runs.prepare import prepare

ROWS = [{"text": text} for text in ("The Eiffel Tower", "the city of Paris", "Diana is in Paris", "The city")]


def scope(**more):
    given = {
        "source": ps.Source(prompt="{text}"),
        "target": ps.Target(prompt="The city -> "),
        "readout": ps.NextToken(top_k=3, reference="source"),
    }
    return ps.Patchscope(**(given | more))


def asked(model, **more):
    given = {
        "model": model,
        "data": ROWS,
        "controls": ["unpatched", "random", "shuffled"],
        "metrics": ["precision_at_1", "nll_nats"],
    }
    return given | more


class Counting:
    """A backend that counts the rows it runs, and can die after some steps."""

    name, remote = "counting", False

    def __init__(self, *, dies_after: int | None = None):
        self.rows, self.steps, self.dies_after = 0, 0, dies_after

    def run(self, context, program, *, source, target, hear):
        if self.steps == self.dies_after:
            raise KeyboardInterrupt
        self.steps += 1
        found = backends.Local().run(context, program, source=source, target=target, hear=hear)
        self.rows += sum(target["cells"] for target in program["targets"])
        return found


@pytest.fixture
def counting(monkeypatch):
    def use(**options):
        backend = Counting(**options)
        monkeypatch.setattr(backends.Places, "backend", backend)
        return backend

    return use


def same(one, other):
    """Two tables are the same: everything but numbers exactly, numbers to 1e-4."""
    pd.testing.assert_frame_equal(one, other, atol=1e-4, rtol=1e-4)
    return True


@pytest.mark.quick
def test_the_folder_holds_the_table_the_manifest_and_the_report(tiny_model, tmp_path):
    run = ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert manifest["n_cells"] == len(run.rows) == 4 + 4 * 4 * 3
    assert manifest["versions"]["nnsight"].startswith("0.8")
    assert manifest["models"]["source"]["dtype"] == "float32"
    assert "<html" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    table = pd.read_parquet(tmp_path / "run/cells.parquet")
    assert list(table.columns) == list(run.table().columns) == manifest["columns"]
    assert len(table) == len(run.rows)
    assert same(ps.load_run(tmp_path / "run").table(), run.table())


def test_columns_come_in_the_order_of_the_design(tiny_model):
    columns = list(ps.run(scope(), **asked(tiny_model())).table().columns)
    assert columns == [
        *("row", "control", "source_prompt", "source_position", "source_token", "source_layer"),
        *("target_prompt", "target_position", "target_token", "target_layer"),
        *("source_model", "target_model", "mapping", "scale", "sample"),
        *("top_tokens", "top_ids", "top_probs", "entropy_nats"),
        *("reference_tokens", "reference_ids", "reference_logprobs", "reference_ranks"),
        *("surprisal_nats", "nll_nats", "kl_nats", "source_top_ids", "precision_at_1", "error"),
    ]


def test_without_a_folder_the_table_is_the_same(tiny_model, tmp_path):
    kept = ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    assert same(ps.run(scope(), **asked(tiny_model())).table(), kept.table())


def test_the_same_call_again_computes_nothing(tiny_model, tmp_path, counting):
    first = ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    manifest = (tmp_path / "run/manifest.json").read_text()
    backend = counting()
    again = ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    assert backend.steps == 0
    assert same(again.table(), first.table())
    assert (tmp_path / "run/manifest.json").read_text() == manifest


@pytest.mark.parametrize("dies_after", [1, 2, 3])
def test_an_interrupted_run_goes_on_where_it_was(tiny_model, tmp_path, counting, dies_after):
    small = {"max_rows": 2}
    whole = ps.run(scope(), **small, **asked(tiny_model()))
    dying = counting(dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        ps.run(scope(), out=tmp_path / "run", **small, **asked(tiny_model()))
    assert json.loads((tmp_path / "run/manifest.json").read_text())["state"] == "running"
    rest = counting()
    resumed = ps.run(scope(), out=tmp_path / "run", **small, **asked(tiny_model()))
    assert dying.rows + rest.rows == len(whole.rows)
    assert same(resumed.table(), whole.table())


def test_a_lost_part_is_run_again_and_a_damaged_one_is_refused(tiny_model, tmp_path, counting):
    whole = ps.run(scope(), out=tmp_path / "run", max_rows=2, **asked(tiny_model()))
    table = whole.table()  # a run is read from its folder, which is about to be damaged
    first, *_ = sorted((tmp_path / "run/cells").glob("*.arrow"))
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(FolderError, match=r"is damaged: .* Delete it; its cells run again"):
        ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    first.unlink()
    n_lost = len(whole.rows) - len(parts.cells(tmp_path / "run"))
    assert n_lost
    (tmp_path / "run/cells/00000099.arrow.1-2.partial").write_bytes(b"what a killed process leaves")
    backend = counting()
    resumed = ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    assert backend.rows == n_lost
    assert same(resumed.table(), table)
    assert sorted(parts.cells(tmp_path / "run")) == list(range(len(whole.rows)))


SMALLER = r"has {} finished cells that are not part of this run, .* Give another --out; with --reuse"
OTHER = "holds cells of another run: its {} is {}, and this run's is {}. Give another --out"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"controls": ["unpatched"]}, SMALLER.format(2 * 16)),
        ({"data": ROWS[:2]}, SMALLER.format(2 + 2 * 4 * 2)),
        ({"scope": scope(source=ps.Source(prompt="{text}", layer=[0, 1]))}, SMALLER.format(2 * 4 * 2)),
        ({"seed": 1}, OTHER.format("seed", 0, 1)),
        ({"metrics": []}, OTHER.format("metrics", r"\['precision_at_1', 'nll_nats'\]", r"\[\]")),
        ({"scope": scope(mapping="target_norm")}, OTHER.format("mapping", "'identity'", "'target_norm'")),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_another_run_never_continues_a_folder(tiny_model, tmp_path, other, message):
    ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    before = parts.contents(tmp_path / "run")
    given = {**other}
    another = given.pop("scope", scope())
    with pytest.raises(FolderError, match=message):
        ps.run(another, out=tmp_path / "run", **asked(tiny_model(), **given))
    assert parts.contents(tmp_path / "run") == before
    assert ps.load_run(tmp_path / "run").manifest["state"] == "finished"


def test_another_mapping_of_the_same_name_is_another_run(tiny_model, tmp_path):
    maps = [ps.Affine(torch.eye(tiny.D_MODEL) * scale) for scale in (1.0, 2.0)]
    ps.run(scope(mapping=maps[0]), out=tmp_path / "run", **asked(tiny_model()))
    digest = "'[0-9a-f]{16}'"
    with pytest.raises(FolderError, match=OTHER.format("weights of mapping all", digest, digest)):
        ps.run(scope(mapping=maps[1]), out=tmp_path / "run", **asked(tiny_model()))


def test_a_folder_with_other_things_in_it_is_left_alone(tiny_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match="is not empty and is not the folder of a run"):
        ps.run(scope(), out=tmp_path, **asked(tiny_model()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_an_older_version_is_not_read_as_an_empty_run(tiny_model, tmp_path):
    ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    shutil.rmtree(tmp_path / "run/cells")
    (tmp_path / "run/cells.jsonl").write_text('{"cell": 0}\n')
    with pytest.raises(FolderError, match=r"written by patchscope-nn 0\.1.* Read its cells\.parquet"):
        ps.load_run(tmp_path / "run")
    with pytest.raises(FolderError, match=r"written by patchscope-nn 0\.1"):
        ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))


def test_a_file_is_no_folder(tiny_model, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FolderError, match="is a file"):
        ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))


def test_two_processes_do_not_write_one_folder(tiny_model, tmp_path):
    prepared = prepare(scope(), **asked(tiny_model())).only
    with (
        open_folder(tmp_path / "run", {"hash": "x"}, prepared),
        pytest.raises(FolderError, match="by another process"),
        open_folder(tmp_path / "run", {"hash": "x"}, prepared),
    ):
        pass


def test_bad_input_writes_nothing(tiny_model, tmp_path):
    with pytest.raises(ps.InputError, match=r"data row 0: source\.position=9 is outside"):
        ps.run(
            scope(source=ps.Source(prompt="{text}", position=9)), out=tmp_path / "run", **asked(tiny_model())
        )
    assert not (tmp_path / "run").exists()


_KILLED = """
from test_runs import ROWS, asked, scope
ps.run(scope(), out={out!r}, max_rows=2, **asked(model))
"""


def test_a_killed_run_resumes_and_ends_with_the_same_table(tiny_model, tmp_path, counting):
    out = tmp_path / "run"
    kill_at(16, _KILLED.format(out=str(out)))
    finished = len(parts.cells(out))
    assert 0 < finished < 52
    backend = counting()
    # The killed process's lock goes with it; the run's identity does not depend on who runs it.
    resumed = ps.run(scope(), out=out, max_rows=2, **asked(tiny_model()))
    assert backend.rows == 52 - finished
    assert same(resumed.table(), ps.run(scope(), **asked(tiny_model())).table())


class Cramped(Counting):
    """A backend whose device holds passes of so many cells; nnsight may wrap what the device raises."""

    def __init__(self, *, holds, error):
        super().__init__()
        self.holds, self.error, self.refused = holds, error, []

    def run(self, context, program, *, source, target, hear):
        rows = max(one["cells"] for one in program["targets"])
        if rows > self.holds:
            self.refused.append(rows)
            raise self.error
        return super().run(context, program, source=source, target=target, hear=hear)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_passes_and_loses_nothing(error, tiny_model, tmp_path, monkeypatch):
    whole = ps.run(scope(), **asked(tiny_model()))
    backend = Cramped(holds=3, error=error)
    monkeypatch.setattr(backends.Places, "backend", backend)
    run = ps.run(scope(), out=tmp_path / "run", max_rows=16, **asked(tiny_model()))
    assert backend.refused == [16, 8, 4]
    assert backend.rows == len(whole.rows)
    assert same(run.table(), whole.table())


def test_out_of_memory_on_a_single_cell_ends_the_run(tiny_model, tmp_path, monkeypatch):
    backend = Cramped(holds=0, error=OUT_OF_MEMORY[0])
    monkeypatch.setattr(backends.Places, "backend", backend)
    with pytest.raises(ps.RunError, match=r"out of memory on a pass of one cell\. Shorten the prompts"):
        ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    assert backend.refused[-1] == 1
    assert json.loads((tmp_path / "run/manifest.json").read_text())["state"] == "running"


def test_another_failure_is_no_lack_of_memory(tiny_model, monkeypatch):
    backend = Cramped(holds=0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.setattr(backends.Places, "backend", backend)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ps.run(scope(), **asked(tiny_model()))
    assert len(backend.refused) == 1


_LARGE = """
import sys, torch
sys.path[:0] = {tests!r}
import tiny
import patchscope_nn as ps
torch.set_num_threads(1)
model = ps.load(tiny.make_module("llama"), tokenizer=tiny.TOKENIZER)

def sweep(out, n_rows):
    letters = "abcdefghijklm"
    words = (first + second + third for first in letters for second in letters for third in letters)
    rows = [{{"text": f"{{word}} is in the city"}} for word, _ in zip(words, range(n_rows))]
    scope = ps.Patchscope(
        source=ps.Source(prompt="{{text}}", layer="all"),
        target=ps.Target(prompt="The city -> ", layer="all"),
        readout=ps.NextToken(top_k=3, reference="source"),
    )
    controls, metrics = ["unpatched", "random", "shuffled"], ["precision_at_1", "nll_nats"]
    return ps.run(scope, model=model, data=rows, controls=controls, metrics=metrics, out=out)

def peak():
    status = open("/proc/self/status").read().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024

sweep({out!r} + "/small", 20)
small = peak()
run = sweep({out!r} + "/large", {n_rows})
print(len(run.rows), small, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_flat_as_a_run_grows(tmp_path):
    """1,000 cells and then 13,000 in one process: what is kept of a cell is some bytes, not its row."""
    code = _LARGE.format(tests=PLACES, out=str(tmp_path), n_rows=260)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells, small, large = map(int, done.stdout.split())
    assert cells == 260 * 49
    table = pd.read_parquet(tmp_path / "large/cells.parquet")
    assert len(table) == cells
    assert table["row"].is_monotonic_increasing
    # A report lists a number of cells with everything that they have; this is its size, once.
    assert large - small < 150e6


def test_summary_is_the_mean_with_its_interval_by_layers_and_control(tiny_model):
    run = ps.run(scope(), **asked(tiny_model()))
    table, summary = run.table(), run.summary()
    at = table[(table.source_layer == 2) & table.control.isna()]
    assert list(summary) == [
        *("metric", "control", "source_layer", "target_layer", "mean", "low", "high", "n_rows", "n_cells")
    ]
    assert len(summary) == 2 * (3 * tiny.N_LAYERS + 1)
    assert set(summary.control) == {"patched", "unpatched", "random", "shuffled"}
    assert summary[summary.control == "unpatched"].source_layer.isna().all()
    for metric in ("precision_at_1", "nll_nats"):
        chosen = (summary.metric == metric) & (summary.source_layer == 2) & (summary.control == "patched")
        (line,) = summary[chosen].to_dict("records")
        assert line["n_rows"] == line["n_cells"] == len(at) == len(ROWS)
        assert line["target_layer"] == 2
        assert line["mean"] == pytest.approx(at[metric].astype(float).mean())
        assert line["low"] <= line["mean"] <= line["high"]


def test_summary_by_source_averages_over_target_layers(tiny_model):
    run = ps.run(
        scope(target=ps.Target(prompt="The city -> ", layer="all")),
        **asked(tiny_model(), controls=["unpatched"], metrics=["nll_nats"]),
    )
    table, summary = run.table(), run.summary(by_source=True)
    assert len(run.summary()) == tiny.N_LAYERS**2 + 1
    assert len(summary) == tiny.N_LAYERS + 1
    (line,) = summary[summary.source_layer == 1].to_dict("records")
    assert line["n_cells"] == len(ROWS) * tiny.N_LAYERS
    assert line["mean"] == pytest.approx(table[table.source_layer == 1]["nll_nats"].mean())


def test_progress_counts_up_to_all(tiny_model):
    seen = []
    run = ps.run(scope(), max_rows=2, progress=lambda *step: seen.append(step), **asked(tiny_model()))
    assert [total for _, total in seen] == [len(run.rows)] * len(seen)
    assert seen == sorted(seen)
    assert seen[-1][0] == len(run.rows)
    assert len(seen) > 2


def test_time_is_recorded(tiny_model, tmp_path):
    started = time.monotonic()
    run = ps.run(scope(), out=tmp_path / "run", **asked(tiny_model()))
    assert 0 < run.manifest["timings"]["elapsed_s"] <= time.monotonic() - started
    assert [session["cells"] for session in run.manifest["sessions"]] == [len(run.rows)]
