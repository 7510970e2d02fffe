"""python -m benchmarks.speed: time the contenders, and write what they took."""

from __future__ import annotations

import os

# Before torch and transformers are imported, which read them then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics

import torch

from benchmarks.speed import floor, ours
from benchmarks.speed.made import MAKERS, make
from benchmarks.speed.measure import Contender, rounds
from patchscope_nn.builtin import NAME
from patchscope_nn.models import load

CONTENDERS = {
    "d": Contender(letter="d", title="ours, off", run=ours.run_unoptimised, sampled="sweep"),
    "e": Contender(letter="e", title="ours", run=ours.run),
    "f": Contender(letter="f", title="floor", run=floor.run),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", nargs="+", default=list(MAKERS))
    parser.add_argument("--contenders", nargs="+", default=list("ef"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sample", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model = load(NAME)
    other = load(NAME)
    for name in args.workload:
        w = make(name, model)
        timings = []
        for t in rounds(
            w,
            [CONTENDERS[c] for c in args.contenders],
            source=model,
            target=other if w.cross else model,
            pairs=args.pairs,
            sample=args.sample,
        ):
            print(name, t, flush=True)
            timings.append(t)
        by = {c: [t for t in timings if t.letter == c] for c in args.contenders}
        for c in args.contenders:
            if c == "f" or "f" not in by:
                continue
            r = [(a.cpu_s / b.cpu_s, a.wall_s / b.wall_s) for a, b in zip(by[c], by["f"])]
            print(name, c, "/ f: cpu %.3f wall %.3f" % tuple(map(statistics.median, zip(*r))), flush=True)


main()
