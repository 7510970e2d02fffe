"""The command line with a real server: doctor, run --remote, jobs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import launch
import pytest

from patchscope_nn.backends.jobs.job_log import JobLog

SWEEP = (
    *("run", "next-token", "--limit", "1", "--set", "source.layer=all"),
    *("--set", "target.layer=all", "--set", "controls=[]"),
)


def patchscope(*arguments, code=0, **variables):
    done = subprocess.run(
        [sys.executable, "-m", "patchscope_nn", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_doctor_finds_all_in_place(ndif):
    found = json.loads(patchscope("doctor", "--remote", ndif, "--json").stdout)
    states = {one["what"]: one["state"] for one in found}
    assert states["server"] == states["cluster"] == states["one cell"] == states["nnsight there"] == "ok"
    assert "wrong" not in states.values()
    assert launch.BUILTIN in next(one["found"] for one in found if one["what"] == "your model")


def test_the_doctor_says_what_is_wrong(ndif):
    found = json.loads(patchscope("doctor", "--remote", "http://127.0.0.1:9", "--json", code=1).stdout)
    assert found[-1]["state"] == "wrong"
    assert "cannot be reached" in found[-1]["found"]
    assert "NDIF_HOST" in found[-1]["mend"]


def test_a_configured_host(ndif):
    found = json.loads(patchscope("doctor", "--remote", "ndif", "--json", NDIF_HOST=ndif).stdout)
    assert {"what": "server", "state": "ok", "found": f"{ndif} answers", "mend": ""} in found


@pytest.mark.parametrize("key", ["11111111-2222-3333-4444-555555555555"])
def test_a_sweep_is_one_request_and_its_key_is_written_nowhere(key, ndif, tmp_path):
    """Thirty layers by thirty: one job, whose result is small."""
    folder = tmp_path / "run"
    done = patchscope(*SWEEP, "--remote", ndif, "--out", str(folder), NDIF_API_KEY=key)
    (job,) = JobLog(folder).jobs()
    assert len(job.cells) == 900
    for file in folder.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file
    assert key not in done.stdout + done.stderr
    listed = json.loads(patchscope("jobs", str(folder), "--json").stdout)
    assert [(one["id"], one["state"], one["cells"]) for one in listed] == [(job.id, "done", 900)]
    assert re.search(rf"{job.id}.*900.*done", patchscope("jobs", str(folder)).stdout.replace("\n", " "))


def test_a_plan_needs_no_weights_and_no_server():
    planned = json.loads(
        patchscope("plan", SWEEP[1], *SWEEP[2:], "--remote", "http://127.0.0.1:9", "--json").stdout
    )
    assert planned["steps"] == 1
    assert planned["cells"] == 900
