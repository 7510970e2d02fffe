"""python -m benchmarks.startup: what `patchscope explain` takes beyond importing torch and its like.

torch, transformers and nnsight load many of their modules when first asked for; what a process has loaded of
them by its end is
imported first here, and timed apart.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import importlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

LIBRARIES = ("torch", "transformers", "nnsight")
COMMAND = ("patchscope", "explain", "Diana, Princess of Wales", "--layer", "3", "--max-new-tokens", "1")
_TIMES = 5


def main() -> None:
    """Measure in fresh processes, after one that warms the file cache."""
    names = _child([])["modules"]
    found = [_child(names) for _ in range(_TIMES)]
    for part in ("imports_s", "own_s"):
        times = sorted(one[part] for one in found)
        print(f"{part}: median {statistics.median(times):.2f}, from {times[0]:.2f} to {times[-1]:.2f}")


def _child(names: Sequence[str]) -> dict[str, list[str] | float]:
    command = [sys.executable, "-m", "benchmarks.startup", "child"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, input=json.dumps(names))  # noqa: S603 (it is us)
    return json.loads(done.stdout)


def child() -> None:
    """Import what is read from stdin, run the command, and print times and modules as JSON."""
    names = json.load(sys.stdin)
    started = time.perf_counter()
    for name in (*LIBRARIES, *names):
        with contextlib.suppress(ImportError):  # a name that is made by a library as it goes
            importlib.import_module(name)
    imported = time.perf_counter()
    from patchscope_nn.cli import main as command

    sys.argv = list(COMMAND)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        command()
    own = time.perf_counter() - imported
    modules = [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]
    print(json.dumps({"imports_s": imported - started, "own_s": own, "modules": modules}))


if __name__ == "__main__":
    child() if sys.argv[1:] == ["child"] else main()
