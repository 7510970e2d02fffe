"""Parts of the server die, are restarted, or allow less: the run ends all the same, or says what is wrong."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import launch
import pytest
from tables import assert_same_table

import patchscope_nn as ps
from patchscope_nn.backends import Places
from patchscope_nn.backends.jobs.client import Patience
from patchscope_nn.backends.jobs.job_log import JobLog
from patchscope_nn.errors import ServerError
from patchscope_nn.runs.execute import Execution, execute
from patchscope_nn.runs.prepare import prepare

pytestmark = pytest.mark.slow
PATIENCE = Patience(unreachable_s=60, unknown_s=8, stalled_s=8, give_up_s=120)
ROWS = [{"s": "The Eiffel Tower"}, {"s": "Diana is"}, {"s": "Paris"}, {"s": "the city"}]


def slow(states):
    """A mapping of the user's own, which takes its time: so that jobs wait behind each other."""
    import time

    time.sleep(3)
    return states * 1


def table(model, *, remote=False, patience=PATIENCE, **options):
    scope = ps.Patchscope(
        source=ps.Source(prompt="{s}", position=-1, layer=[1]),
        target=ps.Target(prompt="Diana is in x", position=-1, layer=[2, 4]),
        mapping=slow,
        # A job of a readout that decodes is one pass.
        readout=ps.Generate(max_new_tokens=2),
    )
    prepared = prepare(scope, model=model, data=ROWS, places=Places.of(remote)).only
    found = execute(prepared, Execution(patience=patience, **options))
    return found.table().drop(columns=["source_model", "target_model"])


@pytest.fixture(scope="module")
def expected(folders):
    return table(ps.load(folders[launch.TINY]))


@pytest.fixture(scope="module")
def away(ndif):
    """Deployed before anything is broken."""
    model = ps.load(launch.TINY, weights=False)
    table(model, remote=ndif)
    return model


#: A job for each cell of `table`, of which one runs and the others wait.
MANY = {"max_rows": 1, "jobs": 4}


@pytest.fixture
def meanwhile(tmp_path):
    """meanwhile(do): do something once the jobs of the run in `tmp_path` are on their way."""
    threads = []

    def later(do):
        def watch():
            end = time.monotonic() + 60
            while len(JobLog(tmp_path / "run").live()) < MANY["jobs"] and time.monotonic() < end:
                time.sleep(0.05)
            do()

        threads.append(threading.Thread(target=watch))
        threads[-1].start()

    yield later
    for thread in threads:
        thread.join()


def restart(name):
    launch.stop(name, number=signal.SIGKILL)
    launch.start(name)
    launch.wait(f"{name} did not come back", launch.healthy, seconds=120, log=f"{name}.log")


def test_the_api_is_restarted_while_jobs_wait(ndif, away, expected, meanwhile, tmp_path):
    """What waited reads QUEUED for ever; a job that was sent later runs, which tells."""
    meanwhile(lambda: restart("api"))
    assert_same_table(table(away, remote=ndif, out=tmp_path / "run", **MANY), expected)
    ends = [job.state for job in JobLog(tmp_path / "run").jobs()]
    assert "lost" in ends
    assert set(ends) == {"lost", "done"}


def parent(pid):
    found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(found[1])


def descends(pid, ancestor):
    while pid > 1:
        if pid == ancestor:
            return True
        pid = parent(pid)
    return False


def test_the_models_actor_is_killed(ndif, away, expected, meanwhile, tmp_path):
    def kill():
        ray = launch.pids()["ray"][0]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                said = (entry / "cmdline").read_bytes()
                if said.startswith(b"ray::ModelActor") and descends(int(entry.name), ray):
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed.append(entry.name)

    killed = []
    meanwhile(kill)
    assert_same_table(table(away, remote=ndif, out=tmp_path / "run", **MANY), expected)
    assert killed


def test_the_dispatcher_is_killed(ndif, away):
    """The API goes on answering, and nothing moves: the client gives up, and says so."""
    said = (launch.LOGS / "api.log").read_text()
    pid = int(re.findall(r"Starting dispatcher with PID (\d+)", said)[-1])
    assert descends(pid, launch.pids()["api"][0])
    os.kill(pid, signal.SIGKILL)
    try:
        with pytest.raises(
            ServerError, match=r"answers, but no job has moved for 6 s: its dispatcher may be down"
        ):
            table(away, remote=ndif, patience=Patience(stalled_s=2, give_up_s=6))
    finally:
        restart("api")


def test_a_time_limit_makes_jobs_smaller(ndif, away, expected, tmp_path):
    """Two cells at three seconds a cell are too many for a job of five seconds; one is not."""
    launch.down()
    launch.TIMEOUT, usual = "5", launch.TIMEOUT
    try:
        launch.up()
        folder = tmp_path / "run"
        assert_same_table(table(away, remote=ndif, out=folder, max_rows=2, jobs=1), expected)
        found = JobLog(folder).jobs()
        assert any("execution timeout" in job.said for job in found)
        assert {job.state for job in found} == {"failed", "done"}
        assert len(found[-1].cells) == 1
    finally:
        launch.down()
        launch.TIMEOUT = usual
        launch.up()


def test_the_object_store_is_down(ndif, away, expected):
    """Results pass through it; then the server as a whole has to be started again."""
    launch.stop("s3", number=signal.SIGKILL)
    try:
        with pytest.raises(
            ServerError, match=r"(answers 500|cannot be reached|no job has moved).* goes on with"
        ):
            table(away, remote=ndif, patience=Patience(unreachable_s=8, stalled_s=4, give_up_s=15))
    finally:
        launch.down()
        launch.up()
    time.sleep(1)
    assert_same_table(table(away, remote=ndif), expected)
