"""Starts and stops `patchscope serve` on this machine's CPU, with all the processes that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = "builtin:smollm2-135m-instruct"
KEY = "a-key-for-tests"
#: The engine of the tests: small, and exact enough to compare.
ENGINE_ARGS = ("max_model_len=2048",)
#: In the environment of a server and its engine, because ids of processes are used again.
_MARK = "PATCHSCOPE_TEST_SERVER=1"
_LOAD_S = 240


def start(
    port, *, log, python=sys.executable, model=MODEL, key=KEY, dtype="float32", engine_args=ENGINE_ARGS
):
    """Start a server in a process group of its own; return its process."""
    command = [str(python), str(HERE / "on_cpu.py"), "serve", str(model), "--port", str(port)]
    command += ["--dtype", dtype, *(["--api-key", key] if key else [])]
    command += [word for pair in engine_args for word in ("--engine-args", pair)]
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with Path(log).open("ab") as file:
        return subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": places} | dict([_MARK.split("=")]),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def about(port, *, key=KEY):
    """What the server on a port says of itself; None if none answers."""
    headers = {"ndif-api-key": key} if key else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/patchscope", headers=headers)
    with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        return json.loads(answer.read())
    return None


def wait(process, port, *, log, key=KEY):
    """Wait until a server answers."""
    end = time.monotonic() + _LOAD_S
    while about(port, key=key) is None:
        if process.poll() is not None or time.monotonic() > end:
            stop(process.pid)
            message = (
                f"patchscope serve did not start; its log ({log}) ends:\n{Path(log).read_text()[-2000:]}"
            )
            raise RuntimeError(message)
        time.sleep(0.5)


def members(group):
    """The processes of a group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, _, number = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            marked = _MARK in (entry / "environ").read_text().split("\0")
            if int(number) == group and state != "Z" and marked:
                found.append(int(entry.name))
    return found


def stop(group, *, number=signal.SIGTERM):
    """End a server and its engine, which outlives a server that is killed: the whole process group."""
    end = time.monotonic() + 15
    while members(group):
        with suppress(ProcessLookupError):
            os.killpg(group, number)
        if time.monotonic() > end:
            number = signal.SIGKILL
        time.sleep(0.2)
