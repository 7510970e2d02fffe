"""Checks of the installation, a model and a server. A finding says how to fix a problem."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from patchscope_nn._util.versions import DECIDING, same_version, versions_of
from patchscope_nn.backends.ndif import client
from patchscope_nn.backends.served.client import served_client
from patchscope_nn.data.readers import READERS
from patchscope_nn.errors import PatchscopeError
from patchscope_nn.metrics import COLUMNS, METRICS
from patchscope_nn.models import Verdict, builtin
from patchscope_nn.spec.mapping import MAPPINGS
from patchscope_nn.spec.readout_registry import READOUTS
from patchscope_nn.spec.sites import SITE_NAMES

_TIMEOUT_S = 30.0


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        what: What was checked.
        state: `ok`, `note` (works, but worth a look) or `wrong`.
        found: What was found.
        mend: The command or action that fixes the problem.
    """

    what: str
    state: Literal["ok", "note", "wrong"]
    found: str
    mend: str = ""


def check_here() -> Iterator[Finding]:
    """Check versions, the builtin model, and what installed packages offer."""
    yield Finding("Python", "ok", platform.python_version())
    for name, version in versions_of(DECIDING).items():
        yield Finding(name, "ok", version)
    installed = builtin.weights_file() is not None or builtin.folder() is not None
    yield Finding(
        "builtin model",
        "ok" if installed else "note",
        "its weights are installed" if installed else "its weights are not installed; they come from the Hub",
        "" if installed else builtin.INSTALL,
    )
    for registry in (METRICS, COLUMNS, READERS, MAPPINGS, READOUTS, SITE_NAMES):
        for name, package, problem in registry.plugins():
            found = f"{name}, of {package}" + (f": {problem}" if problem else "")
            mend = "fix or uninstall that package" if problem else ""
            yield Finding(registry.noun, "wrong" if problem else "ok", found, mend)


def check_model(model: str) -> tuple[Finding, Verdict | None]:
    """Check that a model loads and that its results equal those of plain hooks.

    Args:
        model: Its id, folder or builtin name.

    Returns:
        The finding, and the verdict of the proof; None if the model is refused.
    """
    from patchscope_nn.proof import load

    try:
        loaded = load(model)
    except PatchscopeError as error:
        return Finding("model", "wrong", error.message, error.hint), None
    verdict = loaded.info.verdict
    if verdict is None:
        return Finding("model", "note", f"{model} is not proven: its weights are not on this machine"), None
    took = f" (proven in {verdict.elapsed_s:.1f} s)"
    if not verdict.withheld:
        limit = "" if verdict.limit is None else f", up to {verdict.limit} tokens"
        return Finding("model", "ok", f"{model}: everything equals plain hooks{limit}{took}"), verdict
    off = "; ".join(dict.fromkeys(map(str, verdict.withheld)))
    mend = "nothing to do: it is switched off automatically"
    return Finding("model", "note", f"{model}: {off}{took}", mend), verdict


def check_server(host: str, model: str) -> Iterator[Finding]:
    """Check a server: connection, key, versions, models, and a round trip.

    Args:
        host: Its URL.
        model: The model to use.
    """
    import httpx

    try:
        with client.explained(host):
            httpx.get(f"{host}/ping", timeout=_TIMEOUT_S).raise_for_status()
            yield Finding("server", "ok", f"{host} answers")
            httpx.get(f"{host}/connected", timeout=_TIMEOUT_S).raise_for_status()
            yield Finding("cluster", "ok", "the server reaches its cluster")
            yield _key(host)
            yield from _versions(_get(host, "/env"))
            yield from _models(_get(host, "/status"), model)
        yield from _round_trip(host, model)
    except PatchscopeError as error:
        yield Finding("server", "wrong", error.message, error.hint)


def check_served(host: str, model: str) -> Iterator[Finding]:
    """Check a server of `patchscope serve`: connection, key, engine, model, versions, and a round trip.

    Args:
        host: Its URL.
        model: The model to use.
    """
    try:
        about = served_client(host).about()
        yield Finding("server", "ok", f"{host} answers, knows your key, and its engine is alive")
        if about.model != model:
            yield Finding("your model", "wrong", f"{host} runs {about.model}", f"--model {about.model}")
        held = "" if about.held_tokens is None else f", keys and values of {about.held_tokens} tokens"
        limits = f"prompts and texts of up to {about.max_model_len} tokens{held}"
        yield Finding("model there", "ok", f"{about.model} in {about.dtype}; {limits}")
        for name, theirs in about.versions.items():
            ours = versions_of((name,))[name]
            same = same_version(ours, theirs)
            mend = "" if same else f"pip install '{name}=={theirs}'"
            found = theirs if same else f"{theirs}, here {ours}"
            yield Finding(f"{name} there", "ok" if same else "wrong", found, mend)
        yield from _round_trip(host, about.model)
    except PatchscopeError as error:
        yield Finding("server", "wrong", error.message, error.hint)


def _get(host: str, path: str) -> dict[str, Any]:
    import httpx

    answer = httpx.get(f"{host}{path}", headers=client.headers(), timeout=_TIMEOUT_S)
    answer.raise_for_status()
    return dict(answer.json())


def _key(host: str) -> Finding:
    email = _get(host, "/whoami").get("email")
    if email:
        return Finding("key", "ok", f"valid, of {email}")
    found = "the server does not know your key" if client.headers() else "you have none"
    mend = "export NDIF_API_KEY=... with a key from https://login.ndif.us"
    return Finding("key", "note", f"{found}; the server may not need one", mend)


def _versions(there: dict[str, Any]) -> Iterator[Finding]:
    python = str(there.get("python_version", "?")).split()[0]
    yield Finding("Python there", "ok", f"{python} (code is sent as source: versions may differ)")
    for name, ours in versions_of(DECIDING).items():
        theirs = str(there.get("packages", {}).get(name, "none"))
        same = same_version(ours, theirs)
        # A model's parts move between nnsight's minor versions, and transformers' major ones.
        n_parts = 2 if name == "nnsight" else 1
        near = ours.split(".")[:n_parts] == theirs.split(".")[:n_parts]
        state: Literal["ok", "note", "wrong"] = "ok" if same else "note" if near else "wrong"
        mend = "" if same else f"pip install '{name}=={theirs}'"
        yield Finding(f"{name} there", state, theirs if same else f"{theirs}, here {ours}", mend)


def _models(status: dict[str, Any], model: str) -> Iterator[Finding]:
    running = {
        str(deployment.get("repo_id")): deployment
        for deployment in status.get("deployments", {}).values()
        if deployment.get("application_state") == "RUNNING"
    }
    listed = ", ".join(sorted(running)) or "none"
    yield Finding("models that run", "ok", listed)
    wanted = builtin.HUB_ID if model == builtin.NAME else model
    deployment = running.get(wanted)
    if deployment is None:
        found = f"{wanted} is not running; the server may deploy it on request"
        yield Finding("your model", "note", found, f"--model with a model that runs: {listed}")
        return
    limit = deployment.get("execution_timeout_seconds")
    limited = f", {limit:g} s per job" if limit else ""
    dtype = deployment.get("dtype") or "an unknown dtype"
    yield Finding("your model", "ok", f"{wanted} runs, in {dtype}{limited}")


def _round_trip(host: str, model: str) -> Iterator[Finding]:
    from patchscope_nn.readouts import NextToken
    from patchscope_nn.runs.run import run
    from patchscope_nn.spec import Patchscope, Source, Target

    scope = Patchscope(
        source=Source(prompt="Paris", layer=0), target=Target(prompt="x", layer=0), readout=NextToken(top_k=1)
    )
    started = time.monotonic()
    token = run(scope, model=model, remote=host).table()["top_tokens"][0][0]
    yield Finding("one cell", "ok", f"{token!r} after {time.monotonic() - started:.1f} s")
