"""A real NDIF server on this machine's CPU, on loopback: `python launch.py setup | up | down | status`.

Its parts are Redis, an S3 server (moto), a stand-in for the model hub, Ray, NDIF's controller and NDIF's API.
It has an environment of its own, without patchscope_nn. Everything it makes is in one folder, `.ndif` beside
this checkout, or `NDIF_STATE`. For tests on a closed machine: Ray opens some ports beyond loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import server_command

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
STATE = Path(os.environ.get("NDIF_STATE", ROOT / ".ndif")).resolve()
PYTHON, RUNS, LOGS = STATE / "venv/bin/python", STATE / "pids.json", STATE / "logs"
API, HUB = int(os.environ.get("NDIF_PORT", "8001")), int(os.environ.get("NDIF_HUB_PORT", "9191"))
REDIS, S3, RAY, RAY_CLIENT = 6390, 9090, 6385, 10001
HOST, HUB_URL = f"http://127.0.0.1:{API}", f"http://127.0.0.1:{HUB}"

BUILTIN, TINY = "HuggingFaceTB/SmolLM2-135M-Instruct", "patchscope/tiny-llama"
#: What the server needs on Python 3.11; ndif's own metadata asks for 3.12, where torch comes with CUDA.
PACKAGES = (
    *("torch==2.13.0", "ray[default]==2.60.0", "fastapi", "uvicorn[standard]", "gunicorn", "accelerate"),
    *("python-multipart", "transformers==5.22.0", "zstandard", "peft", "nnsight==0.8.1", "redis", "click"),
    *("python-dotenv", "pyyaml", "boto3", "pydantic", "moto[server]", "numpy"),
)
NDIF = "ndif==0.1.2"
ORDER = ("redis", "s3", "hub", "ray", "api")
#: How long a job may run, in seconds; the tests of a timeout start a server with less.
TIMEOUT = os.environ.get("NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS", "300")


#: Kept, so that no handle is thrown away while its process runs.
_STARTED: list[subprocess.Popen] = []


class Service(NamedTuple):
    """A part of the server: how it is started, and the port that tells that it has."""

    command: tuple[str, ...]
    port: int
    extra: Mapping[str, str] = MappingProxyType({})


def environment():
    """What every part of the server sees; nothing of this checkout but the folder of `actors.py`."""
    ours = {
        "NDIF_STACK": str(STATE),
        "NDIF_REDIS_URL": f"redis://127.0.0.1:{REDIS}",
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{S3}",
        "NDIF_OBJECT_STORE_ACCESS_KEY": "local",
        "NDIF_OBJECT_STORE_SECRET_KEY": "local",
        "NDIF_API_PORT": str(API),
        "NDIF_API_URL": HOST,
        "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{RAY_CLIENT}",
        "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "actors.ModelActor",
        "NDIF_CONTROLLER_IMPORT_PATH": "actors.ControllerActor",
        "NDIF_DEFAULT_DTYPE": "float32",
        "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": TIMEOUT,
        "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
        "NDIF_HOME": str(STATE / "home"),
        "PYTHONPATH": str(HERE),
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "HOME": str(STATE / "home"),
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "OMP_WAIT_POLICY": "PASSIVE",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HF_ENDPOINT": HUB_URL,
        "HF_HOME": str(STATE / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    return kept | ours


def services():
    here = str(PYTHON.parent)
    resources = {"head": 10, "cuda_memory_bytes": 16_000_000_000, "cpu_memory_bytes": 8_000_000_000}
    ray = (
        *(f"{here}/ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1"),
        *("--port", str(RAY), "--ray-client-server-port", str(RAY_CLIENT)),
        # One pretend GPU, because the controller books a model on one.
        *("--num-cpus", "8", "--num-gpus", "1", "--resources", json.dumps(resources)),
        *("--object-store-memory", "200000000", "--include-dashboard", "true"),
        *("--dashboard-host", "127.0.0.1", "--temp-dir", str(STATE / "ray")),
    )
    api = (
        *(f"{here}/gunicorn", "--config", "python:ndif.services.api.gunicorn_conf"),
        *("--bind", f"127.0.0.1:{API}", "ndif.services.api.app:app"),
    )
    # nnsight's `.save`, mounted on every object, breaks large uploads in the API's process.
    quiet = {"NNSIGHT_CONFIG": str(STATE / "api_nnsight.yaml"), "NDIF_SERVICE": "api"}
    redis = ("--port", str(REDIS), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    hub = (str(PYTHON), str(HERE / "hub.py"), str(HUB))
    return {
        "redis": Service(("redis-server", *redis), REDIS),
        "s3": Service((f"{here}/moto_server", "-H", "127.0.0.1", "-p", str(S3)), S3),
        "hub": Service((*hub, *(f"{repo}={path}" for repo, path in models().items())), HUB),
        "ray": Service(ray, RAY_CLIENT),
        "api": Service(api, API, quiet),
    }


def models():
    """The folders of the models it serves; `models.py` makes them."""
    return {BUILTIN: STATE / "models/smollm2", TINY: STATE / "models/tiny-llama"}


def fail(message):
    sys.exit(f"ndif: {message}")


def setup():
    """Build the server's environment: two minutes and 1.7 GB; nothing where it is there."""
    if shutil.which("redis-server") is None:
        fail("redis-server is not installed. On Debian: apt-get install redis-server")
    done = STATE / "installed"
    wanted = "\n".join((*PACKAGES, NDIF))
    if done.exists() and done.read_text() == wanted:
        return
    STATE.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(STATE / "venv")], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", NDIF], check=True)
    done.write_text(wanted)


def pids():
    return json.loads(RUNS.read_text()) if RUNS.exists() else {}


def note(name, pid):
    """Record a part's process: its id, and when it started, since ids are used again."""
    found = pids()
    found.pop(name, None)
    if pid is not None:
        found[name] = [pid, born(pid)]
    RUNS.write_text(json.dumps(found))


def born(pid):
    """When a process started, in the kernel's ticks; None where there is none."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def alive(name):
    pid, when = pids().get(name, (None, None))
    return pid is not None and born(pid) == when


def marked(pid):
    """Whether a process has the mark of this server in its environment."""
    with suppress(OSError):
        return f"NDIF_STACK={STATE}" in Path(f"/proc/{pid}/environ").read_text().split("\0")
    return False


def open_port(port):
    with socket.socket() as one:
        one.settimeout(0.5)
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait(what, ready, *, seconds, log):
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            fail(f"{what} within {seconds} s. Its log: {LOGS / log}")
        time.sleep(0.25)


def start(name):
    """Start one part, and wait for its port."""
    if alive(name):
        return
    service = services()[name]
    taken = f"port {service.port}, which {name} needs, was not free"
    wait(taken, lambda: not open_port(service.port), seconds=10, log=f"{name}.log")
    with (LOGS / f"{name}.log").open("ab") as log:
        started = subprocess.Popen(
            service.command,
            cwd=STATE,
            env=environment() | service.extra,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    note(name, started.pid)
    _STARTED.append(started)
    wait(
        f"{name} did not open port {service.port}",
        lambda: open_port(service.port),
        seconds=90,
        log=f"{name}.log",
    )


def control():
    """Start NDIF's controller, an actor of Ray; Ray needs a moment before it takes one."""
    command = [str(PYTHON), "-m", "ndif.services.ray.deployments.controller.controller"]
    extra = {"RAY_ADDRESS": f"127.0.0.1:{RAY}"}
    with (LOGS / "controller.log").open("ab") as log:
        for _ in range(6):
            done = subprocess.run(
                command, cwd=STATE, env=environment() | extra, stdout=log, stderr=log, check=False
            )
            if done.returncode == 0:
                return
            time.sleep(2)
    fail(f"the controller did not start. Its log: {LOGS / 'controller.log'}")


def healthy():
    with suppress(OSError, urllib.error.URLError):
        return urllib.request.urlopen(f"{HOST}/connected", timeout=5).status == 200  # noqa: S310 (loopback)
    return False


def up():
    """Start what does not run; nothing where all of it does."""
    if not PYTHON.exists() or not all(path.exists() for path in models().values()):
        fail("it is not set up: make ndif-up builds its environment and models.")
    if healthy() and all(alive(name) for name in ORDER):
        return
    down()
    for folder in (LOGS, STATE / "home", STATE / "hf"):
        folder.mkdir(parents=True, exist_ok=True)
    (STATE / "api_nnsight.yaml").write_text("APP:\n  PYMOUNT: false\n")
    for name in ORDER[:-1]:
        start(name)
    control()
    start("api")
    wait("the API did not reach Ray", healthy, seconds=150, log="api.log")


def stop(name, *, number=signal.SIGTERM):
    """Stop one part, and what it started, by its recorded id."""
    if alive(name):
        pid = pids()[name][0]
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
        for one in _STARTED:
            if one.pid == pid:
                with suppress(subprocess.TimeoutExpired):
                    one.wait(15)
        end = time.monotonic() + 15
        while alive(name) and time.monotonic() < end:
            time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    note(name, None)


def down():
    """Stop all of it. What Ray leaves behind is known by the mark in its environment."""
    if RUNS.exists():
        for name in reversed(ORDER):
            stop(name)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and marked(entry.name) and int(entry.name) != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)
    shutil.rmtree(STATE / "ray", ignore_errors=True)
    RUNS.unlink(missing_ok=True)


def status():
    return f"NDIF_HOST={HOST} HF_ENDPOINT={HUB_URL}" if healthy() else "down"


def main():
    server_command.run({"setup": setup, "up": up, "down": down}, fail=fail, status=status)


if __name__ == "__main__":
    main()
