"""Growth: the same sweep with more source prompts, each point in a process of its own.

Run as a module it is one point: `python -m benchmarks.speed.growth W1 4` prints its figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TIMES = (1, 4, 16)
WORKLOADS = ("W1", "W2", "W3")
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
#: The budget that is set, in bytes: what a forward pass may take beyond the model itself.
MEMORY = 2**30


def points(names: Sequence[str], *, threads: int, times: Sequence[int] = TIMES) -> Iterator[dict[str, Any]]:
    """Measure each point in a fresh process, whose peak memory is its own."""
    for name in names:
        for count in times:
            command = [sys.executable, "-m", "benchmarks.speed.growth", name, str(count)]
            command += ["--threads", str(threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 (it is us)
            yield json.loads(done.stdout.splitlines()[-1])


def point(name: str, times: int, *, threads: int) -> dict[str, Any]:
    """Run ours once on a workload that is so many times as large."""
    import torch

    from benchmarks.speed import ours
    from benchmarks.speed.made import Scale, make
    from benchmarks.speed.measure import timed
    from patchscope_nn.models import load
    from patchscope_nn.models.builtin import NAME

    torch.set_num_threads(threads)
    model = load(NAME)
    workload = make(name, model, Scale(times=times))
    before = _memory("VmRSS")
    ours.run_within(workload.smaller(30), model, memory=MEMORY)
    _forget_peak()
    answers, wall, cpu = timed(lambda: ours.run_within(workload, model, memory=MEMORY))
    thousands = len(answers) / 1000
    return {
        "workload": name,
        "times": times,
        "cells": len(answers),
        "wall_s": wall,
        "cpu_s": cpu,
        "wall_s_per_thousand": wall / thousands,
        "cpu_s_per_thousand": cpu / thousands,
        "resident_before": before,
        "resident_peak": _memory("VmHWM"),
        "memory_budget": MEMORY,
    }


def _memory(field: str) -> int:
    """Bytes of this process: VmRSS, held now; VmHWM, the most since `_forget_peak`."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    """Let the kernel count the peak anew; else it would be that of loading the model."""
    _RESET.write_text("5")


def main() -> None:
    """One point, for `points`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workload")
    parser.add_argument("times", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(json.dumps(point(args.workload, args.times, threads=args.threads)))


if __name__ == "__main__":
    main()
