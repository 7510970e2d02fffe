"""python -m benchmarks.remote: the same sweep here and on the real server of tests/remote/server, in pairs.

Both are on one machine and have as many threads. What a remote run takes beside the compute is its overhead
here; over a network the bytes, which the page gives too, take their time as well.
"""

from __future__ import annotations

import os
import sys

# Before torch and the hub's client are imported, which read these then.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HOME", ".ndif/client-hf")
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9191"
sys.path.insert(0, "tests/remote/server")

import argparse
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import launch
import torch
from nnsight.intervention.backends.remote import RemoteBackend
from pandas.testing import assert_frame_equal

import patchscope_nn as ps
from benchmarks.speed.machine import MACHINE, describe
from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.models import Model

TITLE = "# Remote against local\n"
HOW = """\
The builtin model in float32, here and on a real NDIF server on the same machine, threads of each: {threads}.
{pairs} pairs, one run after the other, whose order alternates; medians. Both tables of a pair are the same
within 1e-4. Models are loaded and deployed before; planning, sending, waiting, fetching and the table are
timed. Bytes are those of all requests and results of one run, as they are sent.
"""


class Workload(NamedTuple):
    """A sweep, and the rows it runs over."""

    title: str
    scope: ps.Patchscope
    rows: Sequence[dict[str, Any]]
    source_here: bool = False


class Pair(NamedTuple):
    """One run here and one there, in seconds, and what the one there sent and got, in bytes."""

    cells: int
    local_s: float
    remote_s: float
    requests: tuple[int, ...]
    results: tuple[int, ...]


class Traffic:
    """Counts what nnsight's client sends and gets."""

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.results: list[int] = []
        post, finalize = RemoteBackend._post, RemoteBackend.finalize  # noqa: SLF001 (nnsight has no public way to count the bytes)

        def posting(backend: Any, request: Any, blob: bytes) -> Any:
            self.requests.append(len(blob))
            return post(backend, request, blob)

        def finishing(backend: Any, content: bytes) -> Any:
            self.results.append(len(content))
            return finalize(backend, content)

        RemoteBackend._post, RemoteBackend.finalize = posting, finishing  # noqa: SLF001 (the same)


def workloads() -> Iterator[Workload]:
    """From one request of 900 cells to what a server computes longest on."""
    identity = ps.Target(prompt=ps.prompts.IDENTITY, position=-1, layer="all")
    one = ps.Source(prompt="The Eiffel Tower is in the city of", position=-1, layer="all")
    next_token = ps.Patchscope(source=one, target=identity, readout=ps.NextToken(top_k=5))
    yield Workload("every l x every l*, next token", next_token, [{"row": 1}])
    yield Workload("the same, source here and target there", next_token, [{"row": 1}], source_here=True)
    rows = load_rows(DataSpec(builtin="contexts"))[:10]
    context = ps.Source(prompt="{context}", position=-1, layer="all")
    same = ps.Target(prompt=ps.prompts.IDENTITY, position=-1, layer="same")
    yield Workload(
        "10 contexts, l* = l, next token and its reference",
        ps.Patchscope(source=context, target=same, readout=ps.NextToken(top_k=5, reference="source")),
        rows,
    )
    yield Workload(
        "4 contexts, l* = l, 8 tokens generated",
        ps.Patchscope(source=context, target=same, readout=ps.Generate(max_new_tokens=8)),
        rows[:4],
    )
    yield Workload(
        "4 contexts, l* = l, 3 choices",
        ps.Patchscope(source=context, target=same, readout=ps.Choices([" Paris", " New York", " the sea"])),
        rows[:4],
    )


def pair(workload: Workload, here: Model, there: Model, *, traffic: Traffic, local_first: bool) -> Pair:
    """Run a workload on both sides, and compare the tables."""
    took, tables = {}, {}
    traffic.requests, traffic.results = [], []
    for remote in (False, True) if local_first else (True, False):
        options: dict[str, Any] = {"model": here}
        if remote:
            source = here if workload.source_here else there
            options = {"source_model": source, "target_model": there, "remote": launch.HOST}
            options["source_remote"] = False if workload.source_here else None
        started = time.perf_counter()
        tables[remote] = ps.run(workload.scope, data=workload.rows, **options).table()
        took[remote] = time.perf_counter() - started
    names = ["source_model", "target_model"]
    plain = [tables[remote].drop(columns=names) for remote in (False, True)]
    assert_frame_equal(*plain, rtol=1e-4, atol=1e-4)
    sent = tuple(traffic.requests), tuple(traffic.results)
    return Pair(len(plain[0]), took[False], took[True], *sent)


def line(title: str, pairs: Sequence[Pair]) -> str:
    """A row of the table."""
    local, remote = (statistics.median(one[side] for one in pairs) for side in (1, 2))
    ratio = statistics.median(one.remote_s / one.local_s for one in pairs)
    more = statistics.median(one.remote_s - one.local_s for one in pairs)
    last = pairs[-1]
    kilobytes = (f"{sum(sizes) / 1000:.1f}" for sizes in (last.requests, last.results))
    cells = (title, str(last.cells), str(len(last.results)), f"{local:.2f}", f"{remote:.2f}", f"{ratio:.2f}")
    return "| " + " | ".join((*cells, f"{more:+.2f}", *kilobytes)) + " |"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/remote.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the server's parts read it when they start
    machine = describe(
        threads=args.threads, command=f"python -m benchmarks.remote {shlex.join(sys.argv[1:])}".strip()
    )
    if launch.healthy():
        sys.exit("A server runs, with threads of its own. Stop it first: make ndif-down")
    launch.up()
    try:
        lines = list(_measure(args.pairs))
    finally:
        launch.down()
    facts = [f"- {name}: {machine[name]}" for name in (*MACHINE, "date", "command", "load_at_start")]
    head = (
        *("workload", "cells", "jobs", "local s", "remote s", "remote / local", "remote - local s"),
        *("request kB", "result kB"),
    )
    table = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|", *lines]
    how = HOW.format(threads=args.threads, pairs=args.pairs)
    args.out.write_text("\n".join((TITLE, how, *table, "", *facts)) + "\n", encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


def _measure(pairs: int) -> Iterator[str]:
    here = ps.load(str(launch.models()[launch.BUILTIN]))
    there = ps.load(launch.BUILTIN, weights=False)
    traffic = Traffic()
    for workload in workloads():
        small = workload._replace(rows=workload.rows[:1])
        pair(small, here, there, traffic=traffic, local_first=True)  # deploys, and warms both up
        found = []
        for number in range(pairs):
            found.append(pair(workload, here, there, traffic=traffic, local_first=number % 2 == 0))
            print(workload.title, *found[-1], file=sys.stderr, flush=True)
        yield line(workload.title, found)


if __name__ == "__main__":
    main()
