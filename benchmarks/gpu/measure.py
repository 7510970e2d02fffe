"""Measuring on a device: seconds, the share of them in which it is busy, and its peak memory."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.contenders import FLOOR, Entry
from benchmarks.speed.measure import check
from benchmarks.speed.workloads import Answers, Workload
from patchscope_nn.backends import PassTooLargeError
from patchscope_nn.models import Model

#: How many cells a contender answers in the comparison, and before the time of a slow one counts.
_FEW = 16
#: The most that log-probabilities of two contenders may differ by in float32, in nats.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of a contender on a workload.

    Attributes:
        letter: The contender.
        title: What it is.
        cells: How many cells it ran.
        of_cells: How many the workload has.
        seconds: Wall seconds of each round for these cells; empty if memory ran out.
        busy: The share of a run's wall time in which a kernel runs; None if it was not measured.
        peak_bytes: The most memory allocated on the device beyond the model; None if it was not measured.
        same: How many of its cells say the same as the floor, of those that both ran.
        compared: How many cells both ran.
        worst: The largest difference from the floor's log-probability in nats, where both say the same token.
    """

    letter: str
    title: str
    cells: int
    of_cells: int
    seconds: tuple[float, ...]
    busy: float | None = None
    peak_bytes: int | None = None
    same: int = 0
    compared: int = 0
    worst: float | None = None

    @property
    def wall_s(self) -> float | None:
        """Median seconds for all cells of the workload; scaled if it ran only some."""
        if not self.seconds:
            return None
        return statistics.median(self.seconds) * self.of_cells / self.cells


def compare(workload: Workload, entries: Sequence[Entry], model: Model) -> None:
    """Check that all contenders answer a small workload alike.

    Args:
        workload: It, small enough for all; slow contenders answer a sample of it.
        entries: The contenders.
        model: In float32: in half precision, rounding alone changes the top token.

    Raises:
        DisagreementError: They do not.
    """
    agreed: Answers = {}
    for entry in entries:
        given = entry.contender.given(workload, _FEW)
        with tempfile.TemporaryDirectory() as folder:
            answers = entry.answers(entry.run(given, model, Path(folder)), given)
        check(agreed, answers, given, entry.contender, tolerance=TOLERANCE)
        agreed = {**answers, **agreed}


def measure(
    workload: Workload, entries: Sequence[Entry], model: Model, *, rounds: int, sample: int
) -> Iterator[Figures]:
    """Time contenders on a workload.

    Contenders that run all cells are warmed up with a whole run, timed several times, and once more under the
    profiler. Slow ones are warmed up on a few cells and timed once.

    Args:
        workload: What they run.
        entries: The contenders; the floor first if answers are to be compared with it.
        model: Both M and M*.
        rounds: How often those are timed that run all cells.
        sample: How many cells slow contenders run.
    """
    floor: Answers = {}
    for entry in entries:
        given = entry.contender.given(workload, sample)
        described = {"letter": entry.letter, "title": entry.contender.title}
        described |= {"cells": len(given.cells), "of_cells": len(workload.cells)}
        try:
            found, answers = _measured(entry, given, model, rounds=rounds)
        except (torch.OutOfMemoryError, PassTooLargeError):
            yield Figures(**described, seconds=())
            continue
        if entry.letter == FLOOR:
            floor = answers
        yield Figures(**described, **found, **_agreement(floor, answers))


def _measured(entry: Entry, given: Workload, model: Model, *, rounds: int) -> tuple[dict[str, Any], Answers]:
    whole = entry.contender.sampled is None
    _once(entry, given if whole else entry.contender.given(given.smaller(_FEW), _FEW // 4), model)
    timed = [_once(entry, given, model) for _ in range(rounds if whole else 1)]
    _, answers, peak = timed[-1]
    busy = _busy(entry, given, model) if whole and model.module.device.type == "cuda" else None
    return {"seconds": tuple(wall for wall, *_ in timed), "busy": busy, "peak_bytes": peak}, answers


def _once(entry: Entry, given: Workload, model: Model) -> tuple[float, Answers, int | None]:
    """Run a contender: wall seconds, its answers, and peak memory beyond what is held before, in bytes."""
    device, held = model.module.device, 0
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    with tempfile.TemporaryDirectory() as folder:
        synchronize(device)
        started = time.perf_counter()
        result = entry.run(given, model, Path(folder))
        synchronize(device)
        wall = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
        return wall, entry.answers(result, given), peak


def free_memory(device: torch.device) -> None:
    """Return unused memory to the device: the package plans its passes by what is free there."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _busy(entry: Entry, given: Workload, model: Model) -> float:
    """The share of a run's wall time in which a kernel runs; the profiler's own time counts as idle."""
    device = model.module.device
    activity = getattr(torch.profiler.ProfilerActivity, device.type.upper())
    free_memory(device)  # as before the timed runs, so that this run has the same passes
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[activity]) as profile:
            synchronize(device)
            started = time.perf_counter()
            entry.run(given, model, Path(folder))
            synchronize(device)
            wall = time.perf_counter() - started
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return union_s(kernels(events)) / wall


def kernels(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    """The start and the end of each kernel in a Chrome trace, in microseconds."""
    for event in events:
        if event.get("cat") == "kernel":
            yield event["ts"], event["ts"] + event["dur"]


def union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """The seconds that some interval covers; overlapping ones count once. Intervals are in microseconds."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def _agreement(floor: Answers, answers: Answers) -> dict[str, Any]:
    """How far a contender's answers are the floor's."""
    both = floor.keys() & answers.keys()
    same = [cell for cell in both if floor[cell].said == answers[cell].said]
    pairs = [(floor[cell].logprob, answers[cell].logprob) for cell in same]
    differences = [abs(one - other) for one, other in pairs if one is not None and other is not None]
    return {"same": len(same), "compared": len(both), "worst": max(differences, default=None)}
