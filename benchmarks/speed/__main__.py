"""python -m benchmarks.speed: time the contenders, and write what they took."""

from __future__ import annotations

import os

# Before torch and transformers are imported, which read these then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import table
from benchmarks.speed.contenders import CONTENDERS
from benchmarks.speed.growth import WORKLOADS, points
from benchmarks.speed.machine import describe
from benchmarks.speed.made import MAKERS, make
from benchmarks.speed.measure import Timing, rounds
from benchmarks.speed.workloads import Workload
from patchscope_nn.models import load
from patchscope_nn.models.builtin import NAME


def main() -> None:
    """Measure, print each figure as it comes, and write them all."""
    args = _parse()
    torch.set_num_threads(args.threads)
    machine = describe(
        threads=args.threads, command=f"python -m benchmarks.speed {shlex.join(sys.argv[1:])}".strip()
    )
    for workload, timings in _time(args):
        _say_ratios(workload, timings)
        part = {"title": workload.title, "cells": len(workload.cells)}
        _keep(args.out, workload.name, machine | part | {"timings": [asdict(one) for one in timings]})
    grown = []
    for one in points(args.growth, threads=args.threads):
        _say(one)
        grown.append(one)
    if grown:
        _keep(args.out, "growth", machine | {"growth": grown})
    print((args.out / "speed.md").read_text(encoding="utf-8"))


def _keep(out: Path, name: str, part: dict[str, Any]) -> None:
    """Write a part's figures beside those of others, and the page of all."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    files = [file for name in (*MAKERS, "growth") if (file := out / f"{name}.json").exists()]
    parts = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    (out / "speed.md").write_text(table.document(parts), encoding="utf-8")


def _time(args: argparse.Namespace) -> Iterator[tuple[Workload, list[Timing]]]:
    if not args.workload:
        return
    model = load(NAME)
    other = load(NAME) if any(name == "W5" for name in args.workload) else model
    for workload in [make(name, model) for name in args.workload]:
        timings = []
        for one in rounds(
            workload,
            [CONTENDERS[letter] for letter in args.contenders],
            source=model,
            target=other if workload.cross else model,
            pairs=args.pairs,
            sample=args.sample or None,
        ):
            _say(asdict(one))
            timings.append(one)
        yield workload, timings


def _say(figures: dict[str, object]) -> None:
    shown = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in figures.values())
    print(*shown, file=sys.stderr, flush=True)


def _say_ratios(workload: Workload, timings: Sequence[Timing]) -> None:
    mine = [one for one in timings if one.workload == workload.name]
    for unit in ("cpu_s", "wall_s"):
        if (found := table.ratio(mine, table.OURS, table.FLOOR, unit)) is not None:
            print(f"{workload.name}: ours / floor, {unit}: {found:.3f}", file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed")
    parser.add_argument("--workload", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--pairs", type=int, default=5, help="how many rounds")
    parser.add_argument("--sample", type=int, default=60, help="cells the slow ones run; 0 for all")
    parser.add_argument("--growth", nargs="*", default=[], choices=WORKLOADS, help="workloads to grow, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
