"""Models that `patchscope serve` serves: the same tables, and clear errors where something is wrong."""

from __future__ import annotations

import http.server
import signal
import socket
import threading

import pytest
import serving
from one_table import assert_one_table
from test_recipes_on_vllm import few, tables

import patchscope_nn as ps
from patchscope_nn.backends import Places
from patchscope_nn.backends.jobs.client import Patience
from patchscope_nn.backends.jobs.job_log import JobLog
from patchscope_nn.backends.served import client
from patchscope_nn.errors import InputError, ModelError, ServerError
from patchscope_nn.models import builtin
from patchscope_nn.runs.execute import Execution, execute
from patchscope_nn.runs.prepare import prepare

RECIPES = ("activation-oracle", "causal-tracing", "entity-description", "next-token", "self-interpretation")
HURRIED = Patience(unreachable_s=3, unknown_s=3, stalled_s=3, give_up_s=30)


class Server:
    """A server in a process group of its own."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"vllm+http://127.0.0.1:{self.port}", folder / "server.log"
        self.start()

    def start(self):
        self.process = serving.start(self.port, log=self.log)
        serving.wait(self.process, self.port, log=self.log)

    def stop(self, number=signal.SIGTERM):
        serving.stop(self.process.pid, number=number)
        self.process.wait()


@pytest.fixture(scope="module")
def key():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(client.KEY, serving.KEY)
        yield patch


@pytest.fixture(scope="module")
def server(key, cache, tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.stop()
    assert not serving.members(started.process.pid)


@pytest.mark.vllm_quick
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_on_a_server(name, server, here):
    recipe = few(name)
    found, expected = (
        tables(ps.run(recipe, limit=2, **options)) for options in ({"remote": server.url}, {"model": here})
    )
    for method, table in found.items():
        assert_one_table(table, expected[method])


ROWS = [{"s": text} for text in ("Diana", "The Eiffel Tower", "Paris", "A princess of Wales")]
SCOPE = ps.Patchscope(
    source=ps.Source(prompt="{s}", position=-1, layer=[3, 12, 20]),
    target=ps.Target(prompt="Syria: Country in the Middle East, x", position="x", layer=[2, 12]),
    readout=ps.Generate(max_new_tokens=4),
)


def table(remote, *, out=None, **options):
    prepared = prepare(SCOPE, model=builtin.NAME, data=ROWS, places=Places.of(remote)).only
    return execute(prepared, Execution(patience=HURRIED, **options), out=out).table()


def test_many_small_jobs(server, here, tmp_path):
    expected = ps.run(SCOPE, model=here, data=ROWS).table()
    assert_one_table(table(server.url, max_rows=2, jobs=4, out=tmp_path / "run"), expected)
    states = [job.state for job in JobLog(tmp_path / "run").jobs()]
    assert len(states) >= 12
    assert {*states} == {"done"}


def test_a_wrong_key(server, monkeypatch):
    monkeypatch.setenv(client.KEY, "another")
    with pytest.raises(InputError, match=r"refuses the key.*export PATCHSCOPE_API_KEY"):
        table(server.url)
    monkeypatch.delenv(client.KEY)
    with pytest.raises(InputError, match="refuses the key"):
        table(server.url)


def test_another_model(server):
    with pytest.raises(ModelError, match=r"runs 'builtin:.*', and not 'gpt2'.*Give --model builtin:"):
        ps.run(SCOPE, model="gpt2", data=ROWS, remote=server.url)


def test_other_versions(server, monkeypatch):
    monkeypatch.setattr(client, "versions_of", lambda names: dict.fromkeys(names, "0.0.1"))
    with pytest.raises(ModelError, match=r"and this process has 0\.0\.1.*pip install"):
        table(server.url)


def test_nothing_answers(key):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"vllm+http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=r"cannot be reached.*Start it with `patchscope serve MODEL`"):
        table(url)


def test_another_server_answers(key):
    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_given):
            """Say nothing."""

    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    thread = threading.Thread(target=other.serve_forever, daemon=True)
    thread.start()
    with pytest.raises(InputError, match="is no server of `patchscope serve`"):
        table(f"vllm+http://127.0.0.1:{other.server_port}")
    other.shutdown()
    other.server_close()
    thread.join()


def test_a_guilty_cell_is_found_and_the_others_are_done(server, here, monkeypatch):
    """Its request fails inside the engine, which goes on."""
    rows = [*ROWS[:3], {"s": "Diana", "t": "guilty"}]
    scope = SCOPE.model_copy(
        update={"target": ps.Target(prompt="{t} Country in the Middle East, x", position="x", layer=2)}
    )
    rows = [{"t": "Syria:"} | row for row in rows]
    (guilty,) = here.tokenizer("guilty", add_special_tokens=False)["input_ids"][:1]
    serialised = client._serialised

    def spoilt(model, requests):
        wrong = {"part": "no.such.part", "terms": 1}
        requests = [
            {**request, "site": {**request["site"], **wrong}} if request["ids"][0] == guilty else request
            for request in requests
        ]
        return serialised(model, requests)

    monkeypatch.setattr(client, "_serialised", spoilt)
    found = ps.run(scope, data=rows, remote=server.url).table()
    monkeypatch.undo()
    failed = found["error"].notna()
    assert {*found["row"][failed]} == {3}
    assert {*found["row"][~failed]} == {0, 1, 2}
    assert found["error"][failed].str.contains("a request failed on").all()
    expected = ps.run(scope, model=here, data=rows).table()
    assert_one_table(found[~failed].reset_index(drop=True), expected[~failed].reset_index(drop=True))


def test_a_server_that_is_killed_and_started_again(server, here, tmp_path):
    """The same call ends the run; no cell is lost or doubled."""
    expected = ps.run(SCOPE, model=here, data=ROWS).table()
    done = []

    def kill(count, _total):
        done.append(count)
        if len(done) == 2:
            server.stop(signal.SIGKILL)

    with pytest.raises(ServerError, match="cannot be reached"):
        table(server.url, max_rows=2, jobs=1, out=tmp_path / "run", progress=kill)
    assert 0 < done[-1] < len(expected)
    server.start()
    n_before = len(JobLog(tmp_path / "run").jobs())
    assert_one_table(table(server.url, max_rows=2, jobs=1, out=tmp_path / "run"), expected)
    states = [job.state for job in JobLog(tmp_path / "run").jobs()]
    assert len(states) > n_before
    assert states.count("done") == len(expected) / 2
