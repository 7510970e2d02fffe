"""What goes wrong with a server, or on the way: the same table all the same, or words that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import launch
import parts
import pytest
from tables import assert_same_table

import patchscope_nn as ps
from patchscope_nn._util.clocks import utc_now
from patchscope_nn.backends import Ndif, Places
from patchscope_nn.backends.jobs.client import Patience
from patchscope_nn.backends.jobs.job_log import Job, JobLog
from patchscope_nn.backends.ndif import client
from patchscope_nn.errors import InputError, JobError, ModelError, ServerError
from patchscope_nn.proof import proven_on
from patchscope_nn.runs.execute import Execution, execute
from patchscope_nn.runs.prepare import prepare

HURRIED = Patience(unreachable_s=3, unknown_s=3, stalled_s=3, give_up_s=30)


@pytest.fixture(scope="module")
def here(folders):
    return ps.load(folders[launch.TINY])


@pytest.fixture(scope="module")
def away(ndif):
    """A model that is proven already, so that what goes wrong happens to the jobs of a run."""
    return proven_on(ps.load(launch.TINY, weights=False), Ndif(ndif))


def scope_of(**mapping):
    return ps.Patchscope(
        source=ps.Source(prompt="{s}", position=-1, layer="all"),
        target=ps.Target(prompt="Diana is in x", position=-1, layer="all"),
        **mapping,
    )


ROWS = [{"s": "The Eiffel Tower"}, {"s": "Diana is"}, {"s": "Paris"}, {"s": "the city"}]


def prepared_run(model, *, scope=None, remote=False):
    return prepare(scope or scope_of(), model=model, data=ROWS, places=Places.of(remote)).only


def table(model, *, scope=None, patience=HURRIED, out=None, remote=False, **options):
    prepared = prepared_run(model, scope=scope, remote=remote)
    found = execute(prepared, Execution(patience=patience, **options), out=out)
    return found.table().drop(columns=["source_model", "target_model"])


@pytest.fixture(scope="module")
def expected(here):
    return table(here)


def states(folder):
    return [job.state for job in JobLog(folder).jobs()]


def test_many_jobs_at_a_time(ndif, away, expected, tmp_path):
    assert_same_table(table(away, remote=ndif, max_rows=1, jobs=3, out=tmp_path / "run"), expected)
    assert len(states(tmp_path / "run")) > 10
    assert set(states(tmp_path / "run")) == {"done"}


def test_the_server_is_down(away):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        ServerError, match=r"cannot be reached.*Is it up, and is the address right \(NDIF_HOST"
    ):
        table(away, remote=url)


def test_an_unknown_model(ndif):
    with pytest.raises(ModelError, match=r"'no/such-model' could not be loaded.*Check the id"):
        ps.load("no/such-model", weights=False)


def test_a_model_that_the_hub_does_not_know(ndif, folders):
    """Its folder has config and tokenizer, but no server knows it by that name."""
    model = ps.load(folders[launch.TINY], weights=False)
    with pytest.raises(ModelError, match=r"is no id on the Hub, by which a server .* Give the model's id"):
        table(model, remote=ndif)


def test_a_model_that_the_server_cannot_deploy(ndif, away, monkeypatch):
    monkeypatch.setattr(client, "_key", lambda _model: away.traced.to_model_key().replace("tiny", "gone"))
    with pytest.raises(ModelError, match=r"cannot run this model.*doctor --remote"):
        table(away, remote=ndif, patience=Patience())


class Refusing:
    """An API before the real one: it refuses keys, drops the network, or spoils results, as it is told."""

    def __init__(self, target):
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        import httpx

        outer = self
        self.status, self.spoil, self.drops = None, None, False

        class Proxy(BaseHTTPRequestHandler):
            def log_message(self, *_given):
                """Say nothing."""

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if outer.drops:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                if outer.status:
                    code, text = outer.status, json.dumps({"detail": "Invalid API key."}).encode()
                else:
                    kept = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                    asked = {"content": body, "headers": kept, "timeout": 60}
                    found = httpx.request(self.command, target + self.path, **asked)
                    code, text = found.status_code, found.content
                    if outer.spoil and b'"COMPLETED"' in text:
                        text = outer.spoil(text)
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = answer  # noqa: N815 (the base class's names)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def between(ndif):
    proxy = Refusing(ndif)
    yield proxy
    proxy.server.shutdown()
    proxy.server.server_close()


@pytest.mark.parametrize("code", [400, 401, 403])
def test_a_wrong_key(between, away, code):
    between.status = code
    with pytest.raises(InputError, match=rf"refuses the request \({code}\).*Invalid API key.*NDIF_API_KEY"):
        table(away, remote=between.url)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param((4, replace(HURRIED, unreachable_s=30)), id="a moment"),
        pytest.param((60, Patience()), id="a minute", marks=pytest.mark.slow),
    ],
)
def test_the_network_is_gone_for_a_while(loss, between, away, expected, tmp_path):
    """While jobs are on their way; asking goes on with longer and longer pauses."""
    (seconds, patience), folder = loss, tmp_path / "run"
    gone = threading.Event()

    def drop():
        while not states(folder):
            time.sleep(0.01)
        between.drops = True
        gone.set()
        time.sleep(seconds)
        between.drops = False

    thread = threading.Thread(target=drop)
    thread.start()
    started = time.monotonic()
    found = table(
        away,
        remote=between.url,
        max_rows=2,
        patience=patience,
        out=folder,
    )
    took = time.monotonic() - started
    thread.join()
    assert_same_table(found, expected)
    assert gone.is_set()
    assert took > seconds
    assert len(states(folder)) > 2


def test_a_result_that_is_gone_is_asked_for_again(between, away, expected, tmp_path):
    """The address of a result is valid for an hour; then its job is sent again."""
    spoilt = []

    def spoil(text):
        if not spoilt:
            spoilt.append(text)
            answer = json.loads(text)
            answer["data"] = answer["data"].split("?")[0] + ".gone"
            return json.dumps(answer).encode()
        return text

    between.spoil = spoil
    assert_same_table(table(away, remote=between.url, out=tmp_path / "run"), expected)
    assert states(tmp_path / "run") == ["lost", "done"]


def test_a_job_that_raises_whatever_its_cells_are(ndif, away, tmp_path):
    def failing(states):
        if states.device.type != "meta" and states.shape[0] != 2:  # the check before sending has two states
            raise ValueError("no state pleases me")
        return states

    with pytest.raises(JobError, match=r"the job failed on http.*no state pleases me.*without --remote"):
        table(away, remote=ndif, scope=scope_of(mapping=failing), max_rows=1, out=tmp_path / "run")


def test_a_guilty_cell_is_found_and_the_rest_goes_on(ndif, here, away, tmp_path):
    layer, prompt = 3, "Diana is"
    ids = here.tokenizer(prompt, return_tensors="pt")["input_ids"]
    import torch

    caught = []
    handle = here.module.model.layers[layer].register_forward_hook(lambda *given: caught.append(given[2]))
    with torch.no_grad():
        here.module(input_ids=ids)
    handle.remove()
    guilty = caught[0][0, -1, 0].item()

    def picky(states):
        if bool(((states[:, 0] - guilty).abs() < 1e-4).any()):
            raise ValueError("this state is not for me")
        return states * 1

    found = table(away, remote=ndif, scope=scope_of(mapping=picky), out=tmp_path / "run")
    failed = found[found["error"].notna()]
    assert set(zip(failed["row"], failed["source_layer"], strict=True)) == {(1, layer)}
    assert len(failed) == 6  # one for each l*
    assert failed["error"].str.contains("this state is not for me").all()
    rest = found[found["error"].isna()].drop(columns="mapping")
    whole = table(here).drop(columns="mapping")
    assert_same_table(rest, whole.loc[rest.index].astype(rest.dtypes))


def test_an_unknown_job_is_sent_again(ndif, away, expected, tmp_path):
    """What a server knows no longer is lost, as after its store was emptied."""
    prepared = prepared_run(away, remote=ndif)
    folder = tmp_path / "run"
    execute(prepared, Execution(), out=folder)
    shutil.rmtree(folder / "cells")
    (folder / "jobs.jsonl").unlink()
    numbers = tuple((number,) for number in range(len(prepared.sweep.cells)))
    job = Job(id="0" * 32, host=ndif, context="session", passes=(numbers,), sent=utc_now())
    JobLog(folder, prepared.index).sent(job)
    assert_same_table(table(away, remote=ndif, out=folder), expected)
    assert states(folder)[0] == "lost"
    assert set(states(folder)[1:]) == {"done"}


def test_a_result_of_an_unexpected_shape(ndif, away, tmp_path):
    """A live job of another shape than the folder says, and one that is no job of ours."""
    prepared = prepared_run(away, remote=ndif)
    folder = tmp_path / "run"
    execute(prepared, Execution(), out=folder)
    job = JobLog(folder).jobs()[0]
    shutil.rmtree(folder / "cells")
    (folder / "jobs.jsonl").unlink()
    JobLog(folder, prepared.index).sent(replace(job, passes=(((0,), (1,)),), state="live"))
    with pytest.raises(JobError, match=r"results for \[2\] cells.*doctor --remote"):
        table(away, remote=ndif, out=folder)
    there = client.NdifClient(ndif)
    with pytest.raises(JobError, match="a result of an unexpected shape"):
        there.fetch(there.look(job.id), "fused")


def test_a_live_job_is_fetched_and_not_run_again(ndif, away, expected, tmp_path):
    prepared = prepared_run(away, remote=ndif)
    folder = tmp_path / "run"
    execute(prepared, Execution(), out=folder)
    lines = (folder / "jobs.jsonl").read_text().splitlines()
    (folder / "jobs.jsonl").write_text(lines[0] + "\n")  # as if killed after it was sent
    shutil.rmtree(folder / "cells")
    assert_same_table(table(away, remote=ndif, out=folder), expected)
    assert len(JobLog(folder).jobs()) == len(lines) // 2


def test_a_live_job_of_a_run_that_has_grown_is_fetched_for_its_cells(ndif, away, expected, tmp_path):
    """The job's cells have other numbers in the larger run, and are sent only once."""
    folder = tmp_path / "run"
    small = prepare(scope_of(), model=away, data=ROWS[2:], places=Places.of(ndif)).only
    execute(small, Execution(), out=folder)
    sent, *_ = (folder / "jobs.jsonl").read_text().splitlines()
    (folder / "jobs.jsonl").write_text(sent + "\n")  # as if killed after it was sent
    shutil.rmtree(folder / "cells")
    assert_same_table(table(away, remote=ndif, out=folder), expected)
    prepared = prepared_run(away, remote=ndif)
    first, *others = JobLog(folder, prepared.index).jobs()
    assert first.state == "done"
    assert {prepared.sweep.cells[cell].row for cell in first.cells} == {2, 3}
    assert others
    assert {*first.cells}.isdisjoint(cell for job in others for cell in job.cells)


def test_a_killed_client_loses_and_repeats_nothing(ndif, expected, tmp_path):
    """Killed at five moments of a run of more than ten jobs, then run to its end."""
    folder = tmp_path / "run"
    code = (
        f"import sys; sys.path[:0] = [{str(launch.HERE.parent)!r}, {str(launch.HERE)!r}]\n"
        "import launch, test_faults, patchscope_nn as ps\n"
        "from pathlib import Path\n"
        "away = ps.load(launch.TINY, weights=False)\n"
        f"test_faults.table(away, remote={ndif!r}, max_rows=1, jobs=3, out=Path({str(folder)!r}))\n"
    )
    for count in (1, 2, 4, 7, 10):
        child = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
        end = time.monotonic() + 60
        while time.monotonic() < end and child.poll() is None:
            file = folder / "jobs.jsonl"
            if file.exists() and file.read_text().count("\n") >= 2 * count:
                break
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
    found = table(ps.load(launch.TINY, weights=False), remote=ndif, max_rows=1, jobs=3, out=folder)
    assert_same_table(found, expected)
    assert sorted(parts.cells(folder)) == list(range(len(expected)))
