"""The explorer's server: what it answers, whom it refuses, and how it ends."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict

import httpx
import pytest
import tiny
from explorers import TOKEN, exploring, save_model, serving
from starlette.testclient import TestClient
from tables import NASTY

import patchscope_nn as ps
from patchscope_nn import cli
from patchscope_nn.errors import InputError
from patchscope_nn.explore.answers import Answers
from patchscope_nn.explore.copies import Options, as_python, as_yaml
from patchscope_nn.explore.guard import MAX_BODY
from patchscope_nn.explore.lenses import lenses
from patchscope_nn.explore.server import Explorer, listen
from patchscope_nn.explore.views import WINDOW, CellView, GridView
from patchscope_nn.explore.worker import Query, Worker
from patchscope_nn.recipe import dump, load_recipe
from patchscope_nn.spec.prompts import literal

PORT = 8080
HOME = f"http://127.0.0.1:{PORT}"
PROMPT = "The Eiffel Tower is in the city of"
HOSTILE = NASTY.replace("\ud800", "")  # half a character is refused before anything sees it


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model, by its name."""
    return save_model(tmp_path_factory.mktemp("explore"))


@pytest.fixture(scope="module")
def explorer(model):
    with exploring(model) as made:
        yield made


@pytest.fixture(scope="module")
def client(explorer):
    app = explorer.app(token=TOKEN, port=PORT)
    return TestClient(app, base_url=f"{HOME}/{TOKEN}/", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def served(explorer):
    """The address of the same, on a real server: answers come while they are made."""
    with serving(explorer) as address:
        yield address


def events_of(response):
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def grid_view(model, **fields):
    return {"prompt": PROMPT, "source_model": model, "target_model": model, **fields}


def cell_view(model, **fields):
    return {**grid_view(model), "position": 3, "layer": 2, **fields}


# ---- who may ask ----


@pytest.mark.parametrize("path", ["/", "/wrong/", f"/{TOKEN}x/", "/wrong/about", "/wrong", "//about", "/é/"])
def test_another_token_is_refused(client, path):
    refused = client.get(f"{HOME}{path}")
    assert refused.status_code == 403
    assert "patchscope explore" in refused.text


@pytest.mark.quick
def test_the_page_is_served_with_headers_that_let_nothing_in(client):
    page = client.get("")
    assert page.status_code == 200
    assert "<h1>Patchscope explorer</h1>" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["referrer-policy"] == "no-referrer"
    assert client.get(f"{HOME}/{TOKEN}", follow_redirects=False).headers["location"] == f"/{TOKEN}/"
    for name in ("app.js", "style.css"):
        assert client.get(f"page/{name}").status_code == 200
    assert client.get("page/../server.py").status_code in (403, 404)
    assert client.get("page/%2e%2e/server.py").status_code == 404


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", f"127.0.0.1:{PORT + 1}", ""])
def test_another_host_is_refused(client, host):
    assert client.get("about", headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", f"http://127.0.0.1:{PORT + 1}", f"https://127.0.0.1:{PORT}"]
)
def test_another_origin_is_refused(client, model, origin):
    assert client.post("grid", json=grid_view(model), headers={"origin": origin}).status_code == 403


def test_a_script_of_another_page_is_refused_and_a_link_is_not(client):
    cross = {"sec-fetch-site": "cross-site"}
    assert client.get("about", headers=cross | {"sec-fetch-mode": "no-cors"}).status_code == 403
    assert client.get("", headers=cross | {"sec-fetch-mode": "navigate"}).status_code == 200


def test_its_own_origin_and_localhost_are_served(client):
    assert client.get("about", headers={"origin": HOME}).status_code == 200
    own = {"host": f"localhost:{PORT}", "origin": f"http://localhost:{PORT}"}
    assert client.get("about", headers=own).status_code == 200


def test_a_large_body_is_refused_however_it_comes(client, served):
    large = b"x" * (MAX_BODY + 1)
    assert client.post("grid", content=large).status_code == 413

    def parts():
        for _ in range(MAX_BODY // 1024 + 1):
            yield b"x" * 1024

    assert client.post("grid", content=parts()).status_code == 413
    assert httpx.post(f"{served}grid", content=parts()).status_code == 413


# ---- what is answered ----


def test_a_grid_is_what_the_library_gives(client, model):
    events = events_of(client.post("grid", json=grid_view(model)))
    assert [event["event"] for event in events[-2:]] == ["grid", "done"]
    assert any(event["event"] == "progress" for event in events)
    grid = events[-2]
    run = ps.run(
        ps.Patchscope(
            source=ps.Source(prompt=PROMPT, position=ps.Each("all")),
            target=ps.Target(prompt=ps.prompts.IDENTITY, position=-1),
            readout=ps.NextToken(top_k=5, reference="source"),
        ),
        model=model,
    )
    assert len(grid["cells"]) == len(run.rows) == len(grid["tokens"]) * tiny.N_LAYERS
    for cell, row in zip(grid["cells"], run.rows, strict=True):
        assert [cell["position"]] == row["source_position"]
        assert cell["layer"] == row["source_layer"]
        assert cell["top_tokens"] == row["top_tokens"]
        assert cell["top_probs"] == pytest.approx(row["top_probs"])
        assert cell["entropy_nats"] == pytest.approx(row["entropy_nats"])
        assert cell["surprisal_nats"] == pytest.approx(row["surprisal_nats"])


def test_the_logit_lens_holds_the_models_own_next_token_at_the_last_layer(client, model):
    grid = events_of(client.post("grid", json=grid_view(model, lens="logit-lens")))[-2]
    hits = defaultdict(list)
    for cell in grid["cells"]:
        hits[cell["layer"]].append(cell["hit"])
    assert all(hits[tiny.N_LAYERS - 1])
    assert not all(hits[0])


def test_an_own_target_is_a_lens(client, model):
    target = {"prompt": "The {city} -> ", "position": "->", "layer": "1"}
    grid = events_of(client.post("grid", json=grid_view(model, lens="own", target=target)))[-2]
    assert {cell["target_layer"] for cell in grid["cells"]} == {1}


def test_a_long_prompt_is_shown_in_parts(client, model):
    prompt = "The city " * WINDOW
    grid = events_of(client.post("grid", json=grid_view(model, prompt=prompt)))[-2]
    assert grid["positions"] == list(range(WINDOW))
    assert not grid["whole"]
    later = events_of(
        client.post("grid", json=grid_view(model, prompt=prompt, positions=[WINDOW, WINDOW + 1]))
    )[-2]
    assert {cell["position"] for cell in later["cells"]} == {WINDOW, WINDOW + 1}


def test_a_description_is_told_as_it_is_decoded(client, model):
    events = events_of(client.post("cell", json=cell_view(model)))
    texts = defaultdict(list)
    for event in events:
        if event["event"] == "text":
            texts[event["control"]].append(event)
    said = {event["control"]: event["text"] for event in events if event["event"] == "answer"}
    assert set(said) == {None, "unpatched", "random"} == set(texts)
    for control, grown in texts.items():
        assert [one["n_tokens"] for one in grown] == list(range(1, len(grown) + 1))
        assert grown[-1]["text"] == said[control]
    assert len(texts[None]) > 1
    run = ps.run(CellView(**cell_view(model)).recipe())
    assert said == {row["control"]: row["text"] for row in run.rows}


def test_a_rehearsal_gives_its_text_at_the_end(model):
    answers, told = Answers({}, Options(remote="local")), []
    Query(lambda query: answers.cell(CellView(**cell_view(model)), query), told.append).run()
    kinds = [event["event"] for event in told]
    assert "text" not in kinds
    assert kinds.count("answer") == 3
    assert kinds[-1] == "done"


def test_two_models_answer_together(client, model, tmp_path):
    view = cell_view(model, target_model=save_model(tmp_path / "wide", d_model=48))
    refused = events_of(client.post("cell", json=view))
    assert refused[-1]["event"] == "error"  # 32 numbers are no state of a model of 48
    assert "48" in refused[-1]["message"]
    two = {"target_model": save_model(tmp_path, seed=1)}
    other = Explorer(Answers(lenses(), Options()), models=(model, str(tmp_path)))
    fresh = TestClient(other.app(token=TOKEN, port=PORT), base_url=f"{HOME}/{TOKEN}/")
    events = events_of(fresh.post("grid", json=grid_view(model, **two)))
    assert events[0]["event"] == "started"
    assert events[1] == {"event": "loading", "models": [model, str(tmp_path)]}
    assert {cell["surprisal_nats"] for cell in events[-2]["cells"]} == {None}
    assert other.worker.stop()


WRONG = [
    ({"position": 99}, "source.position=99 is outside this"),
    ({"layer": 77}, "source.layer=77 is outside this model"),
    ({"target_model": "no-such/model"}, "no-such/model"),
    ({"target": {"prompt": "x", "position": "y"}}, "target.position='y' does not occur"),
    ({"target": {"prompt": "x", "layer": "9"}}, "target.layer=9 is outside this model"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_errors_are_the_librarys_own_messages(client, model, fields, message):
    last = events_of(client.post("cell", json=cell_view(model, **fields)))[-1]
    assert last["event"] == "error"
    assert message in last["message"]
    assert last["hint"]
    assert "Traceback" not in json.dumps(last)


BAD = [
    (b"{", "not valid JSON"),
    (b"[]", "not a JSON object"),
    (b"{}", "prompt: is required"),
    (b'{"promt": "x"}', "Did you mean 'prompt'"),
    (b'{"prompt": "", "source_model": "m", "target_model": "m"}', "prompt"),
    (
        b'{"prompt": "\\ud800", "source_model": "m", "target_model": "m"}',
        "holds half a character",
    ),
    (b'{"prompt": "x", "source_model": "m", "target_model": "m", "positions": []}', "positions"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_what_is_no_view_is_refused_with_a_message(client, body, message):
    refused = client.post("grid", content=body)
    assert refused.status_code == 422
    assert message in refused.json()["message"]


def test_what_fails_unexpectedly_is_told_in_a_line_and_logged(model, caplog):
    def fail(_):
        raise ZeroDivisionError("oh")

    told = []
    Query(fail, told.append).run()
    assert told[-1]["event"] == "error"
    assert "ZeroDivisionError: oh" in told[-1]["message"]
    assert "Traceback" not in told[-1]["message"]
    assert "a request failed" in caplog.text


# ---- copies ----


def copies(view, **options):
    recipe = view.recipe(lenses()) if isinstance(view, GridView) else view.recipe()
    return recipe, as_yaml(recipe, Options(**options)), as_python(recipe, Options(**options))


VIEWS = {
    "grid": lambda model: GridView(**grid_view(model)),
    "part": lambda model: GridView(**grid_view(model, positions=[1, 2], lens="logit-lens")),
    "own": lambda model: GridView(**grid_view(model, lens="own", target={"prompt": "{x}", "layer": "embed"})),
    "cell": lambda model: CellView(**cell_view(model, target={"prompt": "a: b, 5:10", "layer": "1"})),
}


@pytest.mark.parametrize("name", VIEWS)
def test_copies_run_as_they_are(model, tmp_path, name):
    recipe, text, script = copies(VIEWS[name](model))
    (tmp_path / "copied.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "copied.yaml") == recipe
    expected = ps.run(recipe)
    assert list(ps.run(tmp_path / "copied.yaml").rows) == list(expected.rows)
    ran = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(script, "copied.py", "exec"), ran)  # noqa: S102 (that it runs is what is tested)
    assert list(ran["run"].rows) == list(expected.rows)
    assert len(printed.getvalue().splitlines()) == len(expected.rows) + 1


@pytest.mark.parametrize(
    "prompt", [HOSTILE, "{entity}", "- a\n- b: 'c'\n", "5:10", "#", " x \t\n", "yes", "\\"]
)
def test_copies_hold_any_text(prompt, tmp_path):
    view = CellView(**cell_view("m", prompt=prompt, target={"prompt": f"{prompt} x"}))
    recipe, text, script = copies(view)
    (tmp_path / "copied.yaml").write_text(text, encoding="utf-8")
    loaded = load_recipe(tmp_path / "copied.yaml")
    assert loaded == recipe
    assert loaded.source.prompt == literal(prompt)
    assert "\u202e" not in script  # which would turn the direction of what follows it
    made = []
    given = {"run": lambda scope, **_: made.append(scope) or 1 / 0}
    source = script.replace("ps.run(", "run(")
    with pytest.raises(ZeroDivisionError):
        exec(compile(source, "copied.py", "exec"), given)  # noqa: S102 (the same)
    assert made == [recipe.scope]


def test_copies_say_where_and_how_the_models_run():
    view = CellView(**{**cell_view("m"), "target_model": "n"})
    _, text, script = copies(view, remote=True, source_remote=False, dtype="bfloat16")
    assert "patchscope run explorer-cell.yaml --remote ndif --source-remote no --dtype bfloat16" in text
    for part in ("source_model='m'", "model='n'", "remote=True", "source_remote=False", "dtype='bfloat16'"):
        assert part in script


def test_the_server_gives_the_copies(client, model):
    recipe, text, script = copies(GridView(**grid_view(model)))
    assert dump(recipe)["source"]["position"] == {"each": "all"}
    assert client.post("copy/grid/recipe", json=grid_view(model)).json()["text"] == text
    assert client.post("copy/grid/python", json=grid_view(model)).json()["text"] == script
    assert client.post("copy/cell/recipe", json=cell_view(model)).status_code == 200
    assert client.post("copy/cell/fortran", json=cell_view(model)).status_code == 404
    refused = client.post("copy/grid/recipe", json=grid_view(model, lens="logit-lense"))
    assert "Did you mean 'logit-lens'" in refused.json()["hint"]


# ---- one thread, many pages ----


def test_two_clients_at_once_are_both_answered(served, model, explorer):
    found, views = {}, {"a": cell_view(model), "b": cell_view(model, layer=0)}
    gate = threading.Event()
    explorer.worker.submit(Query(lambda _: gate.wait(60), lambda _: None))

    def post(name):
        found[name] = []
        with httpx.stream("POST", f"{served}cell", json=views[name], timeout=60) as lines:
            for line in lines.iter_lines():
                found[name].append(json.loads(line))
                if found[name][-1] == {"event": "waiting", "ahead": 2}:
                    gate.set()

    threads = [threading.Thread(target=post, args=(name,)) for name in views]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gate.is_set()
    for name, events in found.items():
        said = {event["control"]: event["text"] for event in events if event["event"] == "answer"}
        run = ps.run(CellView(**views[name]).recipe())
        assert said == {row["control"]: row["text"] for row in run.rows}


def test_a_dropped_request_is_cancelled_and_the_next_one_is_answered(served, model, explorer):
    ran = []
    answer = explorer.answers.cell

    def watched(view, ask):
        ran.append(ask)
        answer(view, ask)

    explorer.answers.cell = watched
    try:
        with httpx.stream(
            "POST", f"{served}cell", json=cell_view(model, max_new_tokens=200), timeout=60
        ) as lines:
            kinds = (json.loads(line)["event"] for line in lines.iter_lines())
            assert "text" in kinds  # and no further
        after = events_of(httpx.post(f"{served}cell", json=cell_view(model), timeout=60))
    finally:
        explorer.answers.cell = answer
    assert after[-1]["event"] == "done"
    assert [ask.cancelled for ask in ran] == [True, True]  # an answered one is, at the end, for tidiness


def test_the_line_moves_on_and_a_cancelled_request_never_begins():
    worker, going, ended = Worker(), threading.Event(), threading.Event()
    told = defaultdict(list)

    def ask(name, task):
        made = Query(task, told[name].append)
        worker.submit(made)
        return made

    begun = threading.Event()
    ask("first", lambda _: begun.set() or going.wait(10))
    assert begun.wait(10)
    second = ask("second", lambda _: None)
    ask("third", lambda _: ended.set())
    assert told["third"] == [{"event": "waiting", "ahead": 2}]
    worker.cancel(second)
    assert told["third"][-1] == {"event": "waiting", "ahead": 1}
    going.set()
    assert ended.wait(10)
    assert worker.stop()
    assert told["second"] == [{"event": "waiting", "ahead": 1}]
    assert told["first"] == [{"event": "started"}, {"event": "done"}]


def test_stopping_tells_whoever_waits():
    worker, begun, told = Worker(), threading.Event(), []

    def work(ask):
        begun.set()
        while True:
            ask.report("working")

    worker.submit(Query(work, lambda event: told.append(event) if event["event"] == "error" else None))
    assert begun.wait(10)
    assert worker.stop()
    assert "was stopped" in told[0]["message"]


# ---- lenses and the command ----


def test_the_recipes_that_are_lenses(tmp_path):
    assert {"token-identity", "logit-lens"} <= set(lenses())
    text = "name: mine\ntitle: Mine\nsource: {prompt: a}\ntarget: {prompt: b, layer: 0}\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert lenses([tmp_path / "mine.yaml"])["mine"].scope.target.layer == 0
    for more, reason in (("readout: generate\n", "its readout is generate"), ("", "columns of the data")):
        wrong = text.replace("prompt: b", 'prompt: "{b}"') if not more else text + more
        (tmp_path / "wrong.yaml").write_text(wrong)
        with pytest.raises(InputError, match=reason):
            lenses([tmp_path / "wrong.yaml"])


def test_a_taken_port_is_an_error():
    with listen(0) as bound:
        bound.listen()
        with pytest.raises(InputError, match="cannot be used"):
            listen(bound.getsockname()[1])


def test_it_listens_on_loopback_alone():
    with listen(0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"
        assert bound.family == socket.AF_INET


def test_without_its_packages_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["patchscope", "explore"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "pip install 'patchscope-nn[explore]'" in capsys.readouterr().err


def test_the_address_is_printed_for_people_and_for_programs(capsys):
    cli.explorer._announce("http://127.0.0.1:1/x/", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"address": "http://127.0.0.1:1/x/"}
    cli.explorer._announce("http://127.0.0.1:1/x/", as_json=False)
    assert capsys.readouterr().out == "http://127.0.0.1:1/x/\n"


def test_ctrl_c_stops_it_cleanly_while_it_answers(model):
    words = ["explore", "--model", model, "--no-browser"]
    process = subprocess.Popen(
        [sys.executable, "-m", "patchscope_nn", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(f"{address}about").json()["source_model"] == model
        view = cell_view(model, max_new_tokens=200)
        with httpx.stream("POST", f"{address}cell", json=view, timeout=60) as lines:
            events = (json.loads(line) for line in lines.iter_lines())
            assert any(event["event"] == "text" for event in events)
            process.send_signal(signal.SIGINT)
            last = list(events)[-1]
        assert last["event"] in ("error", "done")
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in said
