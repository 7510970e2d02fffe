"""The commands of docs/clusters.md run as they stand, with stand-ins for SLURM, nvidia-smi and the GPUs.

Scripts run in bash. Their `patchscope` sends its words, folder and environment to this process, which has
imported the package already. Shards as processes of their own: tests/runs/test_shards.py.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
import threading
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest
import tiny
from commands import caller

import patchscope_nn as ps

PAGE = (Path(__file__).parents[2] / "docs/clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
SMALL, MORE, REUSE, SCRIPT, SUBMIT, GPUS, NDIF = BLOCKS
N_TASKS = N_GPUS = 2

STUDY = """\
name: study
model: model
data: {rows: [{text: The Eiffel Tower}, {text: Paris}, {text: Diana is in Paris}, {text: The city}]}
source: {prompt: "{text}"}
target: {prompt: "The city -> "}
readout: {next_token: {reference: source}}
metrics: [nll_nats]
controls: [unpatched]
"""
#: Runs the tasks of an array one after the other, or the wrapped command, and prints the job's number.
SBATCH = f"""\
#!/bin/bash
for word in "$@"; do
  case "$word" in
    --array=*) script="${{!#}}"
      for task in $(seq 1 {N_TASKS}); do
        SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT={N_TASKS} bash "$script" >&2 || exit 1
      done
      echo 4711; exit ;;
    --wrap) bash -c "${{!#}}"; exit ;;
    --dependency=*) [ "$word" = "--dependency=afterok:4711" ] || exit 1 ;;
  esac
done
exit 1
"""
NVIDIA_SMI = f"#!/bin/bash\n[ $1 = --list-gpus ] && yes 'GPU: a' | head -{N_GPUS}\n"
#: Asks the test to run the command, and ends as the command does.
PATCHSCOPE = f"""\
#!{sys.executable} -S
import os, sys
from multiprocessing.connection import Client
with Client(os.environ["PATCHSCOPE_TEST"]) as test:
    test.send((sys.argv[1:], os.getcwd(), dict(os.environ)))
    code, out, err = test.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the study, its model, and the programs that the commands name."""
    place = tmp_path_factory.mktemp("cluster")
    tiny.make_module("llama").save_pretrained(place / "model")
    tiny.TOKENIZER.save_pretrained(place / "model")
    (place / "study.yaml").write_text(STUDY)
    (place / "bin").mkdir()
    programs = {"sbatch": SBATCH, "nvidia-smi": NVIDIA_SMI, "patchscope": PATCHSCOPE}
    for name, text in programs.items():
        file = place / "bin" / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return place


@pytest.fixture
def shell(place, monkeypatch, capsys):
    """Runs commands in bash, and each `patchscope` of theirs in this process, where a GPU is a CPU."""
    patchscope = caller(monkeypatch, capsys)

    def answer(words, folder, environment):
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name, value in environment.items():
                patch.setenv(name, value)
            return patchscope(*("cpu" if word == "cuda" else word for word in words))

    def run(commands):
        address = str(place / "patchscope.socket")
        path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
        bash = ["bash", "-e", "-o", "pipefail", "-c", commands]
        script = subprocess.Popen(
            bash,
            cwd=place,
            env=os.environ | {"PATH": path, "PATCHSCOPE_TEST": address},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

        def end():
            """Wait for the script, and wake the loop below."""
            errors.append(script.communicate()[1])
            Client(address).close()

        errors = []
        with Listener(address, backlog=8) as listener:
            waiting = threading.Thread(target=end)
            waiting.start()
            while True:
                with listener.accept() as command:
                    try:
                        request = command.recv()
                    except EOFError:
                        break
                    command.send(tuple(answer(*request)))
            waiting.join()
        assert script.returncode == 0, errors

    return run


@pytest.fixture(scope="module")
def whole(place):
    return ps.run(place / "study.yaml", model=str(place / "model")).table()


def columns(table):
    """What a table has besides the models' names and numbers that rounding may move."""
    return table[["row", "control", "source_prompt", "source_layer", "target_layer", "top_tokens"]].to_dict(
        "list"
    )


@pytest.fixture
def here(place, monkeypatch, capsys):
    """Runs a block of single commands, in this process, and returns what the last one prints."""
    monkeypatch.chdir(place)
    patchscope = caller(monkeypatch, capsys)

    def run(block):
        for name, *words in map(shlex.split, block.splitlines()):
            assert name == "patchscope"
            done = patchscope(*words)
            assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_run_grows_and_is_reused(here, place):
    here(SMALL)
    here(MORE)
    grown = ps.load_run(place / "runs/small")
    assert [session["cells"] for session in grown.manifest["sessions"]] == [2 * 5, 2 * 5, 4 * 4]
    assert set(grown.table()["row"]) == {0, 1, 2, 3}
    printed = here(REUSE)
    assert "15 cells in runs/three" in printed
    assert "15 of them are from runs/small" in printed


def test_a_slurm_array_runs_shards_and_merges_them(shell, place, whole):
    (place / "study.sbatch").write_text(SCRIPT)
    shell(SUBMIT)
    shards = sorted((place / "runs/study-shards").iterdir())
    assert [ps.load_run(shard).manifest["shard"] for shard in shards] == ["1/2", "2/2"]
    assert columns(ps.load_run(place / "runs/study").table()) == columns(whole)


def test_each_gpu_runs_a_shard(shell, place, whole):
    shell(GPUS)
    assert len([*(place / "runs/study-gpus").iterdir()]) == N_GPUS
    assert columns(ps.load_run(place / "runs/study-of-gpus").table()) == columns(whole)


def test_a_run_with_several_jobs_at_a_time(here, place, whole):
    """Here as a rehearsal; tests/remote sends jobs to a real server."""
    here(NDIF.replace("--remote ndif", "--remote local"))
    assert columns(ps.load_run(place / "runs/study-remote").table()) == columns(whole)
