"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from itertools import product

import pandas as pd
import parts
import pytest
import tiny
import typer
from commands import caller

from patchscope_nn import cli
from patchscope_nn.cli import options
from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.errors import ModelError
from patchscope_nn.models import builtin, load
from patchscope_nn.runs.folder import RunFolder
from patchscope_nn.runs.results import load_run

RECIPE = """\
name: tiny
title: What comes next?
data: {rows: [{text: The Eiffel Tower}, {text: the city of Paris}, {text: Diana is in Paris}]}
source: {prompt: "{text}"}
target: {prompt: "The city -> "}
readout: {next_token: {top_k: 2, reference: source}}
metrics: [precision_at_1, nll_nats]
controls: [unpatched, random, shuffled]
"""
N_CELLS = 3 + 3 * 4 * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model and a recipe that names it."""
    here = tmp_path_factory.mktemp("cli")
    module = tiny.make_module("llama")
    module.config.max_position_embeddings = 512  # the description prompt is long in so small a vocabulary
    module.save_pretrained(here / "model")
    tiny.TOKENIZER.save_pretrained(here / "model")
    (here / "tiny.yaml").write_text(RECIPE + f"model: {here / 'model'}\n")
    return here


@pytest.fixture
def patchscope(folder, monkeypatch, capsys):
    """Call the command line in this process, which has torch loaded already."""
    monkeypatch.chdir(folder)
    return caller(monkeypatch, capsys)


def start(folder, *words, code="from patchscope_nn.cli import main; main()", **options):
    """Start the command line as a process of its own."""
    given = {"cwd": folder, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, **options}
    return subprocess.Popen([sys.executable, "-c", code, *words], **given)


def test_run_prints_the_summary_the_folder_and_the_report(patchscope, folder):
    done = patchscope("run", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert "What comes next?" in done.stdout
    assert f"{N_CELLS} cells in runs/tiny-" in done.stdout
    assert "report: runs/tiny-" in done.stdout
    assert f"tiny: {N_CELLS} of {N_CELLS} cells" in done.stderr
    (run,) = (folder / "runs").glob("tiny-*")
    assert {entry.name for entry in run.iterdir()} >= {
        "manifest.json",
        "cells",
        "cells.parquet",
        "report.html",
    }
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["command"] == "patchscope run tiny.yaml"

    again = json.loads(patchscope("run", "tiny.yaml", "--json").stdout)
    assert again["folder"] == f"runs/{run.name}"
    assert again["cells"] == N_CELLS
    (run / "report.html").unlink()
    rebuilt = patchscope("report", str(run), "--json")
    assert json.loads(rebuilt.stdout) == {"report": str(run / "report.html")}
    assert (run / "report.html").stat().st_size > 10_000


def test_a_run_without_a_report_says_how_to_write_it(patchscope, folder):
    done = patchscope("run", "tiny.yaml", "--no-report", "--out", "unreported")
    assert done.returncode == 0, done.stderr
    assert "no report: patchscope report unreported" in done.stdout
    assert (folder / "unreported/cells.parquet").exists()
    assert not (folder / "unreported/report.html").exists()
    assert patchscope("report", "unreported").returncode == 0
    assert (folder / "unreported/report.html").stat().st_size > 10_000


def test_run_prints_a_line_for_each_scale_and_an_interval_for_each_mean(patchscope):
    done = patchscope(
        *("run", "tiny.yaml", "--set", "target.scale=[0.5, 2]", "--set", "source.layer=[1, 3]"),
        *("--set", "metrics=[nll_nats]", "--out", "scaled"),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace(", ", ",").splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("scale"))
    assert lines[head].split() == ["scale", "layer", "patched", "random", "shuffled"]
    table = load_run("scaled").table()
    kinds = table["control"].fillna("patched")
    for line, (scale, layer) in zip(lines[head + 1 :], product((0.5, 2.0), (1, 3)), strict=False):
        named, at, *means = line.split()
        assert (float(named), int(at)) == (scale, layer)
        cells = table[(table["scale"] == scale) & (table["source_layer"] == layer)]
        expected = cells.groupby(kinds)["nll_nats"].mean()
        assert list(map(float, means[::2])) == pytest.approx(
            list(expected[["patched", "random", "shuffled"]]), abs=0.006
        )
        for mean, interval in zip(means[::2], means[1::2], strict=True):
            low, high = map(float, interval.strip("[]").split(","))
            assert low <= float(mean) <= high
    flat = table.loc[kinds == "unpatched", "nll_nats"].mean()
    assert lines[head + 6].startswith(f"nll_nats without a state: unpatched {flat:.2f} [")


@pytest.mark.quick
def test_explain_puts_the_unpatched_control_on_top(patchscope):
    done = patchscope("explain", "The Eiffel Tower", "--model", "model", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "model on 'The Eiffel Tower', token 4 ' Tower'"
    assert lines[2].split()[0] == "layer"
    assert [line.split()[0] for line in lines[3:]] == ["unpatched", "0", "1", "2", "3"]


def test_braces_in_an_explained_prompt_are_text(patchscope):
    done = patchscope("explain", "The {city}{", "--model", "model", "--layer", "0", "--max-new-tokens", "1")
    assert done.returncode == 0, done.stderr
    assert "'The {city}{'" in done.stdout


def test_explain_as_json(patchscope):
    done = patchscope(
        *("explain", "the city of Paris", "--model", "model", "--layer", "1:3", "--position", "city"),
        *("--target-layer", "2", "--max-new-tokens", "2", "--json"),
    )
    look = json.loads(done.stdout)
    assert look["token"] == [" city"]
    assert [(one["layer"], one["target_layer"]) for one in look["says"]] == [(None, None), (1, 2), (2, 2)]
    assert done.stderr == ""


@pytest.mark.parametrize("word", ["yes", "no", "on", "off"])
def test_a_selector_is_read_as_in_a_recipe(patchscope, word):
    """YAML 1.1 reads these words as booleans; in YAML 1.2, which recipes follow, they are texts."""
    done = patchscope(
        *("explain", f"The {word}", "--model", "model", "--layer", "0", "--position", word),
        *("--max-new-tokens", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token"] == [word[-1]]
    assert options.parse_selector(f"[{word}, 3, -1]", option="--position") == [word, 3, -1]


@pytest.mark.parametrize("text", ["[0, 4", "{a: 1, a: 2}"])
def test_a_selector_that_is_no_yaml_is_bad_input(patchscope, text):
    done = patchscope("explain", "The Eiffel Tower", "--model", "model", "--layer", text)
    assert done.returncode == 2
    assert f"--layer={text!r} " in done.stderr
    assert "Give an index, a list such as [0, 4], or a text." in done.stderr


def test_plan_runs_nothing(patchscope, folder):
    before = set(folder.rglob("*"))
    done = patchscope("plan", "tiny.yaml", "--max-rows", "8", "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert "cells: 26 (2 unpatched, 8 patched, 8 random, 8 shuffled)" in done.stdout
    assert set(folder.rglob("*")) == before
    counts = json.loads(patchscope("plan", "tiny.yaml", "--max-rows", "8", "--limit", "2", "--json").stdout)
    assert counts["cells"] == 26
    assert counts["source_rows"] == 2


def test_recipes_lists_what_ships_and_what_it_costs(patchscope, folder, monkeypatch):
    loads = []

    def tiny_instead(name, *, weights):
        loads.append((name, weights))
        return load(folder / "model", weights=weights)

    monkeypatch.setattr("patchscope_nn.runs.costs.load", tiny_instead)
    done = patchscope("recipes")
    assert done.returncode == 0, done.stderr
    assert "next-token" in done.stdout
    listed = {one["name"]: one for one in json.loads(patchscope("recipes", "--json").stdout)}
    assert {"next-token", "logit-lens", "entity-description"} <= set(listed)
    rows = len(load_rows(DataSpec(builtin="entities")))
    # Every row: T as it is, T with the text, and for each of four layers the state and two controls.
    cells = rows * (2 + 4 * 3)
    assert listed["entity-description"]["cost"] == {
        "rows": rows,
        "cells": cells,
        "decoded_tokens": 20 * cells,
        "fits": False,
    }
    assert listed["next-token-prediction"]["cost"]["fits"]
    assert loads == [(builtin.NAME, False)] * 2  # once for each call


def test_recipes_says_why_a_cost_cannot_be_counted(patchscope, monkeypatch):
    def absent(name, **_):
        raise ModelError(f"{name} is not there.", hint="Install it.")

    monkeypatch.setattr("patchscope_nn.runs.costs.load", absent)
    assert f"?: {builtin.NAME} is not there." in patchscope("recipes").stdout
    listed = json.loads(patchscope("recipes", "--json").stdout)
    assert all(one["cost"] is None and "not there" in one["uncounted"] for one in listed)


def test_lint_tells_every_problem_with_its_line(patchscope, folder):
    (folder / "bad.yaml").write_text(
        "name: bad\ntitle: x\nsorce: {prompt: a}\nreadout: {generate: {seed: x}}\n"
    )
    done = patchscope("lint", "bad.yaml", "tiny.yaml", "next-token")
    assert done.returncode == 2
    assert "bad.yaml:3: sorce: is not a field here. Did you mean 'source'?" in done.stdout
    assert "bad.yaml:4: readout.generate.seed:" in done.stdout
    assert "tiny.yaml: ok" in done.stdout
    assert "next-token: ok" in done.stdout
    found = json.loads(patchscope("lint", "bad.yaml", "--json").stdout)
    assert {one["line"] for one in found["bad.yaml"]} >= {3, 4}


BAD = {
    "unknown recipe": (["run", "nxt-token"], "'nxt-token' is not a recipe"),
    "unknown field": (["run", "tiny.yaml", "--set", "source.layers=3"], "source.layers"),
    "layer": (
        ["run", "tiny.yaml", "--set", "source.layer=4"],
        "source.layer=4 is outside this model, whose 4",
    ),
    "position": (
        ["run", "tiny.yaml", "--set", "source.position=9"],
        "data row 0: source.position=9 is outside",
    ),
    "text": (["run", "tiny.yaml", "--set", "target.position=Rome"], "'Rome' does not occur in this"),
    "half a token": (
        ["run", "tiny.yaml", "--set", "target.position=cit"],
        "does not end with a whole token of this",
    ),
    "column": (["run", "tiny.yaml", "--set", "source.prompt='{txt}'"], "the column 'txt'"),
    "data": (["run", "tiny.yaml", "--set", "data={file: none.jsonl}"], "none.jsonl"),
    "empty data": (["run", "tiny.yaml", "--set", "data={rows: []}"], "is an empty list"),
    "mapping": (["run", "tiny.yaml", "--set", "mapping={affine: none.safetensors}"], "none.safetensors"),
    "function": (["run", "tiny.yaml", "--set", "mapping={function: nowhere:f}"], "nowhere:f"),
    "model": (["run", "tiny.yaml", "--model", "empty"], "the model 'empty' could not be loaded"),
    "remote": (["run", "tiny.yaml", "--remote", "somewhere"], "remote='somewhere' is not a server"),
    "one row": (["run", "tiny.yaml", "--limit", "1"], "controls: shuffled"),
    "fused": (["run", "tiny.yaml", "--set", "target.layer=0", "--context", "fused"], "context='fused' runs"),
    "no run": (["report", "model"], "model is not the folder of a run: it has no manifest.json"),
    "explain nothing": (["explain", "", "--model", "model"], "prompt: is an empty text"),
    "context of two": (["run", "tiny.yaml", "--context", "nested"], "context='nested' does not serve one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_message_not_a_traceback(patchscope, folder, name):
    (folder / "empty").mkdir(exist_ok=True)
    words, message = BAD[name]
    runs = set((folder / "runs").glob("*"))
    done = patchscope(*words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert set((folder / "runs").glob("*")) == runs


def test_errors_as_json(patchscope):
    done = patchscope("run", "tiny.yaml", "--set", "source.layer=x", "--set", "seed=y", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 2
    assert [one["field"] for one in said["problems"]] == ["source.layer", "seed"]


def test_options_can_be_set_by_the_environment(patchscope, monkeypatch):
    monkeypatch.setenv("PATCHSCOPE_LIMIT", "2")
    counts = json.loads(patchscope("plan", "tiny.yaml", "--json").stdout)
    assert counts["source_rows"] == 2


COMMANDS = dict(typer.main.get_command(cli.app).commands)
FIT = COMMANDS.pop("fit")
COMMANDS |= {f"fit {kind}": FIT.get_command(None, kind) for kind in FIT.list_commands(None)}


@pytest.mark.parametrize(
    ("command", "option"),
    [
        pytest.param(name, one, id=f"{name} {one.name}")
        for name, command in COMMANDS.items()
        for one in command.params
        if one.param_type_name == "option"
    ],
)
def test_every_option_has_its_variable(command, option):
    long = max(option.opts, key=len)
    assert option.envvar == "PATCHSCOPE_" + long.removeprefix("--").upper().replace("-", "_")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json(name):
    assert "json" in {one.name for one in COMMANDS[name].params}


VARIABLES = {
    "PATCHSCOPE_MODEL": ("model", lambda counts: counts["folder"].startswith("runs/tiny-")),
    "PATCHSCOPE_SET": ("source.layer=[0,1]", lambda counts: counts["cells"] == 3 + 3 * 2 * 3),
    "PATCHSCOPE_MAX_ROWS": ("1", lambda counts: counts["target_passes"] > 1),
    "PATCHSCOPE_REMOTE": ("local", lambda counts: counts["cells"] == N_CELLS),
    "PATCHSCOPE_CONTEXT": ("session", lambda counts: counts["cells"] == N_CELLS),
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_is_an_option(patchscope, variable, monkeypatch):
    value, holds = VARIABLES[variable]
    monkeypatch.setenv(variable, value)
    assert holds(json.loads(patchscope("plan", "tiny.yaml", "--json").stdout))


def test_a_wrong_variable_is_bad_input(patchscope, monkeypatch):
    monkeypatch.setenv("PATCHSCOPE_LIMIT", "few")
    done = patchscope("plan", "tiny.yaml")
    assert done.returncode == 2
    assert "--limit" in done.stderr


def test_models_are_named_by_options(patchscope):
    done = patchscope("plan", "tiny.yaml", "--target-model", "model", "--dtype", "bfloat16")
    assert "M:  " in done.stdout
    assert "bfloat16" in done.stdout


def test_interrupted_says_how_to_go_on_and_goes_on(patchscope, folder):
    words = ("run", "tiny.yaml", "--max-rows", "1", "--out", "stopped")
    slow = (
        # A test started in the background inherits an ignored SIGINT, which would hide what is tested.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import time; from patchscope_nn.runs.folder import RunFolder; append = RunFolder.append\n"
        "def slowly(*a): append(*a); print('step', flush=True); time.sleep(0.5)\n"
        "RunFolder.append = slowly; from patchscope_nn.cli import main; main()"
    )
    pipe = subprocess.PIPE
    process = start(folder, *words, code=slow, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Finished cells are kept in stopped; continue with:" in errors
    assert "Traceback" not in errors
    finished = len(parts.cells(folder / "stopped"))
    assert 0 < finished < N_CELLS
    resumed = patchscope(*words)
    assert resumed.returncode == 0, resumed.stderr
    assert len(parts.cells(folder / "stopped")) == N_CELLS


def test_a_killed_run_goes_on_and_ends_with_the_same_table(patchscope, folder):
    """kill -9 in the middle of the command as it is: nothing slowed, nothing patched."""
    # The tokenizer knows no digits; rows of equal tokens would run once.
    letters = (f"{n:07b}".replace("0", "a").replace("1", "b") for n in range(100))
    rows = "data=" + json.dumps({"rows": [{"text": f"the city of Paris {one}"} for one in letters]})
    words = ("run", "tiny.yaml", "--set", rows, "--max-rows", "1", "--out")
    n_cells = 100 + 100 * tiny.N_LAYERS * 3
    out = folder / "killed"
    process = start(folder, *words, "killed", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and len(parts.contents(out)) < 3:
            time.sleep(0.01)
        process.kill()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, errors
    finished = parts.contents(out)
    assert 20 <= len(parts.cells(out)) < n_cells
    assert not (out / "cells.parquet").exists()

    resumed = patchscope(*words, "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert finished.items() <= parts.contents(out).items()
    assert sorted(parts.cells(out)) == list(range(n_cells))
    assert patchscope(*words[:4], "--out", "unhurt").returncode == 0
    tables = [pd.read_parquet(folder / name / "cells.parquet") for name in ("killed", "unhurt")]
    pd.testing.assert_frame_equal(*tables, atol=1e-4, rtol=1e-4)


def test_a_full_disk_fails_the_run_and_the_run_can_go_on(patchscope, folder, monkeypatch):
    words = ("run", "tiny.yaml", "--max-rows", "1", "--out", "filled")
    append = RunFolder.append

    def full(self, rows):
        if self.n_done > 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path / "cells"))
        append(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "append", full)
        done = patchscope(*words)
    assert done.returncode == 1
    assert "error: [Errno 28] No space left on device: 'filled/cells'." in done.stderr
    assert "the same command continues the run" in done.stderr
    assert "Traceback" not in done.stderr
    assert patchscope(*words).returncode == 0
    assert len(parts.cells(folder / "filled")) == N_CELLS


def test_a_terminal_gets_a_bar(patchscope, monkeypatch):
    leader, follower = pty.openpty()
    seen = []

    def read():
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(leader, 4096):
                seen.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        done = patchscope("run", "tiny.yaml", "--out", "barred")
    reader.join(timeout=60)
    os.close(leader)
    assert done.returncode == 0
    assert f"{N_CELLS}/{N_CELLS}".encode() in b"".join(seen)
    assert "━".encode() in b"".join(seen)


_LIGHT = """
import sys, time
sys.argv = ["patchscope", *{words!r}]
from patchscope_nn.cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
heavy = {{"torch", "transformers", "nnsight", "pandas", "pyarrow", "plotly", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["lint", "next-token"]])
def test_light_commands_load_nothing_heavy(words):
    code = _LIGHT.format(words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_option_is_called_verbose(patchscope):
    """nnsight reads -v and --verbose from argv and turns its debug output on."""
    for command in ("run", "explain", "plan", "lint", "recipes", "report"):
        text = patchscope(command, "--help").stdout
        assert "--verbose" not in text
        assert " -v" not in text


@pytest.fixture
def typed(monkeypatch):
    """typed(text): what stands on standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_a_recipe_is_read_from_standard_input(patchscope, folder, typed):
    (folder / "rows.jsonl").write_text('{"text": "The Eiffel Tower"}')
    recipe = RECIPE.partition("data:")[0] + "".join(RECIPE.partition("source:")[1:])
    recipe += f"data: {{file: rows.jsonl}}\nmodel: {folder / 'model'}\n"
    recipe = recipe.replace(", shuffled", "")
    typed(recipe)
    assert patchscope("lint", "-") == (0, "-: ok\n", "")
    typed(recipe)
    planned = json.loads(patchscope("plan", "-", "--json").stdout)
    typed(recipe)
    ran = json.loads(patchscope("run", "-", "--json", "--set", "source.layer=1").stdout)
    assert (planned["cells"], ran["cells"]) == (1 + 4 * 2, 1 + 2)


def test_what_is_wrong_with_standard_input_is_told_with_its_line(patchscope, typed):
    typed("name: a\nsource: {prompt: x, layers: 3}\n")
    done = patchscope("run", "-")
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard input: line 2: source.layers: is not a field here.")
