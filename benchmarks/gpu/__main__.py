"""python -m benchmarks.gpu: time the contenders on a GPU, with models of real sizes and random weights.

Without a GPU it says so and measures nothing. `--device cpu --shape tiny` rehearses everything on the CPU.
"""

from __future__ import annotations

import os

# Before torch and transformers are imported, which read these then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import table
from benchmarks.gpu.contenders import ENTRIES
from benchmarks.gpu.measure import compare, free_memory, measure, synchronize
from benchmarks.gpu.shapes import SHAPES, make_model
from benchmarks.gpu.workloads import NAMES, TINY, Sizes, workloads
from benchmarks.speed.machine import describe
from patchscope_nn.models import Model

RESULTS = Path("benchmarks/results")
_SKIPPED = """\
SKIPPED: python -m benchmarks.gpu measured nothing, because torch finds no CUDA device here.
Run it on a machine with a GPU, or rehearse it here: python -m benchmarks.gpu --device cpu --shape tiny"""
#: The blocks of the model on which contenders are compared, and its workloads.
_COMPARED_LAYERS = 4
_COMPARED = {"contexts": (8,), "entities": 4, "texts": 16, "generated": 4}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the contenders, then measure them, and print and write the figures of each workload."""
    args = _parse(sys.argv[1:] if arguments is None else arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(_SKIPPED, file=sys.stderr)
        return
    rehearsal = args.shape == "tiny"
    sizes = TINY if rehearsal else Sizes()
    _compare(args, sizes)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    started = time.perf_counter()
    model = make_model(SHAPES[args.shape], device=torch.device(args.device), dtype=dtype)
    synchronize(model.module.device)
    _say(f"{args.shape}: made and loaded in {time.perf_counter() - started:.1f} s. {_proof(model)}")
    parts = []
    for name in args.workloads:
        for workload in workloads(name, model, sizes):
            _say(f"{workload.name}: {workload.title}")
            figures = []
            for one in measure(workload, ENTRIES, model, rounds=args.rounds, sample=args.sample):
                _say(f"  {one}")
                figures.append(asdict(one))
            part = {"workload": workload.name, "title": workload.title, "cells": len(workload.cells)}
            part |= {"rehearsal": rehearsal, "figures": figures, **_setting(args, model)}
            parts.append(part)
            if not rehearsal:
                _write(args.out, part)
    print(table.document(parts), end="")


def _compare(args: argparse.Namespace, sizes: Sizes) -> None:
    """Check that all contenders say the same, on a float32 model of the same width, and free it again."""
    shape, device = SHAPES[args.shape], torch.device(args.device)
    model = make_model(shape, device=device, dtype=torch.float32, n_layers=_COMPARED_LAYERS, proof=False)
    small = replace(sizes, **_COMPARED)
    for name in args.workloads:
        for workload in workloads(name, model, small):
            compare(workload, ENTRIES, model)
    _say(f"All contenders agree on {' '.join(args.workloads)} (float32, {_COMPARED_LAYERS} blocks).")
    del model
    free_memory(device)


def _setting(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = args.device == "cuda"
    command = f"python -m benchmarks.gpu {shlex.join(args.given)}".strip()
    return {
        **describe(threads=torch.get_num_threads(), command=command),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else "n/a",
        "shape": args.shape,
        "shape_title": SHAPES[args.shape].title,
        "dtype": model.info.dtype,
        "proof": _proof(model),
    }


def _proof(model: Model) -> str:
    """How long the proof of the model's structure took when it was made, and what it switched off."""
    verdict = model.info.verdict
    withheld = "; ".join(str(entry) for entry in verdict.withheld) or "every optimisation is on"
    return f"The model's proof took {verdict.elapsed_s:.1f} s, which is not timed here; {withheld}."


def _write(out: Path, part: dict[str, Any]) -> None:
    """Write a workload's figures beside those of others, and the page of all."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"gpu-{part['shape']}-{part['workload']}.json"
    file.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    parts = [json.loads(one.read_text(encoding="utf-8")) for one in sorted(out.glob("gpu-*.json"))]
    (out / "gpu.md").write_text(table.document(parts), encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--shape", default="llama-8b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only rehearses")
    parser.add_argument("--rounds", type=int, default=3, help="how often fast contenders are timed")
    parser.add_argument("--sample", type=int, default=32, help="cells the slow ones run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures of a GPU are written")
    args = parser.parse_args(given)
    if args.device == "cpu" and args.shape != "tiny":
        parser.error("--device cpu only rehearses the benchmark: add --shape tiny")
    args.given = list(given)
    return args


if __name__ == "__main__":
    main()
