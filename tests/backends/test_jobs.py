"""What is refused before a request is sent, and what crosses between two models; no server is needed."""

from __future__ import annotations

import io
import sys
import types

import huggingface_hub
import pytest
import torch
from pandas.testing import assert_frame_equal

import patchscope_nn as ps
from patchscope_nn import backends
from patchscope_nn.backends.crossing import Traffic, size, source_half, target_half, traffic, weights
from patchscope_nn.backends.jobs.client import JobStatus
from patchscope_nn.backends.jobs.job_log import Job, JobLog
from patchscope_nn.backends.jobs.job_size import JobSize
from patchscope_nn.backends.ndif import client
from patchscope_nn.backends.ndif.client import NdifClient, host_of
from patchscope_nn.backends.ndif.portability import check_travels
from patchscope_nn.cli import plan_printing, running
from patchscope_nn.errors import InputError, JobError, MappingError, ModelError, ServerError
from patchscope_nn.lower import nothing
from patchscope_nn.runs.execute import Execution, execute, plan_run
from patchscope_nn.runs.prepare import prepare


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A module that is installed here, and so need not be on a server."""
    module = types.ModuleType("lens_of_mine")
    module.__file__ = str(tmp_path / "site-packages/lens_of_mine.py")
    exec("def scaled(states):\n    return states * 2\n", module.__dict__)  # noqa: S102 (a module made here)
    monkeypatch.setitem(sys.modules, "lens_of_mine", module)
    return module


def test_a_mapping_of_an_installed_module_is_refused_with_the_line_that_lets_it_travel(installed):
    with pytest.raises(
        MappingError, match=r"needs the module 'lens_of_mine'.*nnsight.register\('lens_of_mine'\)"
    ):
        check_travels(installed.scaled)


def test_so_is_what_a_mapping_calls(installed):
    def calling(states):
        return installed.scaled(states)

    with pytest.raises(MappingError, match="lens_of_mine"):
        check_travels(calling)


def test_once_registered_it_travels(installed):
    import nnsight
    from cloudpickle import unregister_pickle_by_value

    nnsight.register("lens_of_mine")
    try:
        check_travels(installed.scaled)
    finally:
        unregister_pickle_by_value(installed)


def test_a_mapping_that_holds_a_model_is_refused(tiny_model):
    other = tiny_model(seed=1).traced

    def through(states):
        return other.model.norm(states)

    with pytest.raises(MappingError, match="holds a model of its own, and a request names one"):
        check_travels(through)


def test_two_models_in_one_request_are_refused(tiny_model):
    with pytest.raises(InputError, match="a request names one model; context='nested' runs two"):
        NdifClient("http://127.0.0.1:9").submit("nested", {"mapping": ["identity", None]}, tiny_model())


def test_a_hub_that_cannot_be_reached_is_not_taken_for_the_server(monkeypatch):
    """The error is one of httpx or of httpx2, depending on the version of huggingface_hub."""
    hub = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    traced = types.SimpleNamespace(to_model_key=lambda: hub.model_info("some/model"))
    model = types.SimpleNamespace(traced=traced, info=types.SimpleNamespace(name="some/model"))
    with (
        pytest.raises(ServerError, match=r"the Hub cannot be asked .* 'some/model' \(ConnectError"),
        client.explained("http://127.0.0.1:9"),
    ):
        client._key(model)


def test_a_remote_that_is_no_url():
    with pytest.raises(InputError, match=r"remote='here' is not a server.*URL"):
        host_of("here")


@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        ("Replica was evicted while processing. Please try again later.", ServerError, "evicted"),
        ("Could not deploy this model. Repository Not Found", ModelError, "doctor --remote"),
        ("Your job exceeded the execution timeout of 5s.", JobError, "--max-rows"),
        ("Traceback (most recent call last):\n  ...\nValueError: no", JobError, "ValueError: no"),
    ],
)
def test_what_a_server_says_becomes_an_error(said, kind, text):
    found = NdifClient("http://x").failure(JobStatus(status="ERROR", description=said))
    assert type(found) is kind
    assert text in str(found)


def test_the_job_that_asks_after_a_server_is_one_that_runs(tiny_model):
    model = tiny_model()
    found = backends.Rehearsal().run("session", nothing(), source=model, target=model)
    assert found == {"passes": [], "kept": None, "kept_finals": None, "prefix": None}


def program_of(mapping):
    places = {"rows": torch.zeros(1, dtype=int), "positions": torch.ones(1, dtype=int)}
    source = {"reads": {0: places, 2: places}, "finals": places}
    writing = {"mapping": "call", "weights": mapping, "mode": "blend", "amount": 0.5}
    return nothing() | {"writing": writing, "sources": [source]}


def half_of(program, states, finals=None):
    """The target half of a step whose source half has read these."""
    return target_half(program, {"passes": [], "kept": states, "kept_finals": finals, "prefix": None})


def test_the_source_half_returns_all_that_it_reads():
    half = source_half(program_of(ps.Affine(torch.eye(4))))
    assert half["keep"].tolist() == [0, 1]
    assert half["keep_finals"].tolist() == [0]
    assert half["writing"]["mapping"] == "identity"


@pytest.mark.parametrize(("widths", "here"), [((8, 16), True), ((16, 8), True)])
def test_a_mapping_with_weights_runs_here(widths, here):
    """Its weights are more bytes than the wider states."""
    mapping = ps.Affine(torch.ones(widths[1], widths[0]))
    half = half_of(program_of(mapping), torch.ones(2, widths[0]), torch.ones(1, 99))
    assert (half["writing"]["mapping"] == "identity") is here
    assert half["writing"]["weights"] is None
    assert (half["writing"]["mode"], half["writing"]["amount"]) == ("blend", 0.5)
    assert torch.equal(half["given"], torch.full((2, widths[1]), float(widths[0])))
    assert torch.equal(
        half["given_finals"], torch.ones(1, 99)
    )  # a distribution is no state, and is not mapped
    assert half["sources"] == []


def test_a_function_that_widens_states_runs_there():
    def widened(states):
        return torch.cat([states, states], dim=-1)

    half = half_of(program_of(widened), torch.ones(2, 4))
    assert half["writing"]["weights"] is widened
    assert half["given"].shape == (2, 4)


@pytest.mark.parametrize("field", ["given", "keep", "sums"])
def test_states_that_others_use_too_are_mapped_there(field):
    """States from earlier steps, for later steps, or of which sums are made are sent as they are."""
    zero = torch.zeros(1, dtype=int)
    sums = {"count": 1, "states": zero, "weights": torch.ones(1), "into": zero}
    mapping = ps.Affine(torch.ones(4, 8))
    half = half_of(
        program_of(mapping) | {field: {"given": torch.zeros(1, 8), "keep": zero, "sums": sums}[field]},
        torch.ones(2, 8),
    )
    assert half["writing"]["weights"] is mapping
    assert half["given"].shape == (3 if field == "given" else 2, 8)
    assert torch.equal(half["given"][-2:], torch.ones(2, 8))


NARROW, WIDE = 32, 48
CROSSING = {
    "identity": (NARROW, NARROW, "identity"),
    "target_norm": (NARROW, NARROW, "target_norm"),
    "to a wider one": (NARROW, WIDE, ps.Affine(torch.ones(WIDE, NARROW))),
    "to a narrower one": (WIDE, NARROW, ps.Affine(torch.ones(NARROW, WIDE))),
    "to one as wide": (NARROW, NARROW, ps.Affine(torch.eye(NARROW) * 2, torch.ones(NARROW))),
    "a function that widens": (NARROW, WIDE, lambda states: torch.cat([states, states[..., :16]], dim=-1)),
}


@pytest.mark.parametrize("remote", ["local", False])
@pytest.mark.parametrize("max_rows", [1, None])
@pytest.mark.parametrize("case", CROSSING)
def test_what_a_plan_says_crosses_is_what_crosses(case, max_rows, remote, tiny_model, monkeypatch):
    """And the table is that of one context for both, whoever maps the states, once."""
    widths, mapping = CROSSING[case][:2], CROSSING[case][2]
    source, target = (tiny_model(seed=seed, d_model=width) for seed, width in enumerate(widths))
    scope = ps.Patchscope(
        source=ps.Source(prompt="{s}", position=[0, -1], layer=[0, 2]),
        target=ps.Target(prompt="Diana is in x", position=[0, -1], layer=[1, 3]),
        mapping=mapping,
        readout=ps.NextToken(reference="source"),
    )
    rows = [{"s": s} for s in ("Paris", "the city", "Diana is", "The Eiffel Tower")]
    given = {"source_model": source, "target_model": target, "data": rows, "controls": ["shuffled"]}
    prepared = prepare(scope, places=backends.Places.of(remote), **given).only
    execution = Execution(context="bridged", max_rows=max_rows)
    planned = plan_run(prepared, execution)
    crossed = []

    def crossing(program, read):
        half = target_half(program, read)
        crossed.append((size(half["given"]) + size(half["given_finals"]), half["writing"]))
        return half

    monkeypatch.setattr("patchscope_nn.backends.places.target_half", crossing)
    bridged = execute(prepared, execution).table()
    said = traffic(planned, prepared.mapping)
    weighed = [weights(writing["weights"]) for _, writing in crossed]
    assert any(len(step.carried) for step in planned.steps()) is (max_rows == 1 and not remote)
    assert said.steps == len(crossed)
    assert said.bytes == sum(size for size, _ in crossed) + sum(weighed)
    assert said.mapped_here == (
        sum(writing["mapping"] == "identity" for _, writing in crossed)
        if prepared.mapping.kind == "call"
        else 0
    )
    nested = execute(prepare(scope, **given).only, Execution(context="nested")).table()
    assert_frame_equal(bridged, nested, rtol=1e-4, atol=1e-4)


def test_one_context_for_two_models_has_no_bridge(tiny_model):
    scope = ps.Patchscope(source=ps.Source(prompt="Paris", layer=0), target=ps.Target(prompt="x", layer=1))
    prepared = prepare(scope, source_model=tiny_model(), target_model=tiny_model(seed=1)).only
    assert traffic(plan_run(prepared), prepared.mapping) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, ""),
        ({"mapping": "target_norm"}, "; target_norm maps them where M* runs"),
        (
            {"mapping": "affine", "mapped_here": 3, "weights": 4096},
            "; affine maps them here, before they cross, and its weights (4 KiB) stay here",
        ),
        (
            {"mapping": "affine", "weights": 512},
            "; affine maps them where M* runs; its weights cross too (512 bytes a step, counted)",
        ),
        (
            {"mapping": "mine", "mapped_here": 1},
            "; mine maps them here in 1 steps, and there in the others",
        ),
    ],
)
def test_a_plan_says_where_the_mapping_runs(given, text):
    said = Traffic(steps=3, states=9, distributions=2, bytes=2048, **given)
    start = "bridge: 9 states and 2 distributions cross to M*, 2 KiB in 3 steps"
    assert plan_printing._crossing_line(said) == start + text


def test_a_model_without_its_weights_is_described_as_the_one_with(tmp_path, tiny_model):
    from dataclasses import replace

    import tiny

    for family in ("llama", "gpt2", "gemma3", "gptj", "opt"):
        folder = tmp_path / family
        tiny.make_module(family).save_pretrained(folder)
        tiny.TOKENIZER.save_pretrained(folder)
        bare, full = ps.load(str(folder), weights=False), ps.load(str(folder), proof=False)
        assert not bare.traced.dispatched
        assert bare.info.device == "remote"
        same = {"device": "", "architecture": None, "tied": None, "revision": None}
        assert replace(bare.info, **same) == replace(full.info, **same)
        assert bare.info.architecture.blocks == full.info.architecture.blocks


def test_a_small_run_is_one_job():
    size = JobSize(900)
    assert not size.learning
    assert size.most is None


def test_a_large_run_begins_with_a_short_job_and_learns_from_it():
    size = JobSize(100_000)
    assert size.learning
    assert size.most == 256
    size.took(256, seconds=2.56, result_bytes=2560)
    assert not size.learning
    assert size.most == 3000  # thirty seconds' worth
    size.took(3000, seconds=60.0, result_bytes=30_000)  # slower than it was thought
    assert size.most == 2000
    assert size.left_s(1000) == pytest.approx(15.0)
    assert size.result_bytes == 32_560


def test_a_job_grows_as_jobs_turn_out_to_be_quick():
    size = JobSize(100_000)
    size.took(256, seconds=25.6, result_bytes=1)
    before = size.most
    size.took(before, seconds=before * 0.01, result_bytes=1)
    assert size.most > before


def test_a_job_carries_no_more_than_a_server_allows_or_a_result_should_hold():
    size = JobSize(100_000)
    size.took(256, seconds=0.256, result_bytes=256 * 2**20)
    assert size.most == 32
    size.too_long(20)
    assert size.most == 10
    small = JobSize(900)
    small.too_long(900)
    assert small.most == 450


def test_a_server_that_does_not_say_what_a_job_took_is_not_asked_to_be_quick():
    size = JobSize(100_000)
    size.took(256, seconds=None, result_bytes=0)
    assert not size.learning
    assert size.most is None
    assert size.left_s(10) is None


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys):
    """interrupted(answer): Ctrl-C with two jobs on their way; what is asked and said, and their states.

    Without an answer standard input is no terminal.
    """
    job_log = JobLog(tmp_path)
    for number in range(3):
        passes = (((number,),),)
        job_log.sent(Job(id=f"job-{number}", host="http://x", context="session", passes=passes, sent=""))
    job_log.ended("job-0", "done")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def interrupt(answer=None):
        stdin = io.StringIO() if answer is None else Terminal(f"{answer}\n")
        monkeypatch.setattr(sys, "stdin", stdin)
        running._leave_or_cancel(tmp_path)
        said = capsys.readouterr()
        assert not said.out.strip()  # click leaves the blank before the answer to readline
        return said.err, [job.state for job in JobLog(tmp_path).jobs()]

    return interrupt


def test_a_ledger_that_is_read_is_not_changed_and_a_half_line_goes_before_the_next(tmp_path):
    """A run may be writing while `patchscope jobs` reads."""
    file = tmp_path / "jobs.jsonl"
    job = Job(id="one", host="http://x", context="session", passes=(((0,),),), sent="")
    JobLog(tmp_path).sent(job)
    with file.open("a") as stream:
        stream.write('{"id": "two", "ho')
    before = file.read_bytes()
    found = JobLog(tmp_path)
    assert found.jobs() == (job,)
    assert file.read_bytes() == before
    found.ended("one", "done")
    assert [one.state for one in JobLog(tmp_path).jobs()] == ["done"]
    assert file.read_text().count("\n") == 2


LEFT = "2 jobs are left on the server; the same command fetches their results."
ASKED = "2 jobs are unfinished. Leave them, to be fetched by the same command, or cancel them?"


@pytest.mark.parametrize("answer", ["leave", "l", ""])
def test_interrupted_jobs_that_are_left_stay_live(interrupted, answer):
    said, states = interrupted(answer)
    assert ASKED in said
    assert LEFT in said
    assert states == ["done", "live", "live"]


@pytest.mark.parametrize("answer", ["cancel", "c", "Cancel"])
def test_interrupted_jobs_that_are_cancelled_are_dropped(interrupted, answer):
    said, states = interrupted(answer)
    assert ASKED in said
    assert "Cancelled: their results will not be fetched." in said
    assert states == ["done", "dropped", "dropped"]


def test_an_answer_that_is_neither_is_asked_for_again(interrupted):
    said, states = interrupted("q\ncancel")
    assert said.count("[leave/cancel]") == 2
    assert states == ["done", "dropped", "dropped"]


def test_without_a_terminal_jobs_are_left_and_nobody_is_asked(interrupted):
    said, states = interrupted()
    assert said.strip() == LEFT
    assert states == ["done", "live", "live"]


def test_a_second_interrupt_leaves_the_jobs(interrupted, monkeypatch, tmp_path):
    def again(*_given, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.prompt", again)
    said, states = interrupted("")
    assert said.strip() == LEFT
    assert states == ["done", "live", "live"]


def test_without_live_jobs_nobody_is_asked(interrupted, tmp_path):
    JobLog(tmp_path).drop()
    assert interrupted("cancel") == ("", ["done", "dropped", "dropped"])
