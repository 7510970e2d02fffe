"""Measuring: contenders take turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.speed.workloads import Answers, Workload, disagreement
from patchscope_nn.models import Model

Run = Callable[[Workload, Model, Model], Answers]
#: How many cells each contender runs before its time counts.
_WARM = 30


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run a sweep.

    Attributes:
        letter: How tables call it.
        title: What it is.
        run: It.
        sampled: Whether it runs cell by cell, so that a sample of cells tells how long all take; `sweep` for
            a sample that is itself a smaller sweep.
    """

    letter: str
    title: str
    run: Run
    sampled: str = ""

    def given(self, workload: Workload, count: int | None) -> Workload:
        """What it is given to run of a workload."""
        if not self.sampled or count is None or count >= len(workload.cells):
            return workload
        return workload.smaller(count) if self.sampled == "sweep" else workload.sample(count)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One run of one contender.

    Attributes:
        letter: The contender.
        round: Which round.
        cells: How many cells it ran.
        wall_s: Seconds it took.
        cpu_s: Seconds of processor time, of all threads.
    """

    letter: str
    round: int
    cells: int
    wall_s: float
    cpu_s: float


def timed(run: Callable[[], Answers]) -> tuple[Answers, float, float]:
    """What a call gives, its wall seconds and its CPU seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    answers = run()
    return answers, time.perf_counter() - wall, time.process_time() - cpu


def rounds(
    workload: Workload,
    contenders: Sequence[Contender],
    *,
    source: Model,
    target: Model,
    pairs: int,
    sample: int | None,
) -> Iterator[Timing]:
    """Time contenders in turn, a b c, a b c, ..., and compare what they say.

    Args:
        workload: What they run.
        contenders: Who runs.
        source: M.
        target: M*.
        pairs: How many rounds count.
        sample: How many cells the slow ones run; None for all.

    Yields:
        Each run's timing.

    Raises:
        AssertionError: Two of them say different things.
    """
    first: Answers = {}
    for one in contenders:
        one.run(one.given(workload.smaller(_WARM), _WARM), source, target)
    for number in range(pairs):
        for one in contenders:
            given = one.given(workload, sample)
            answers, wall, cpu = timed(lambda one=one, given=given: one.run(given, source, target))
            if len(answers) != len(given.cells):
                raise AssertionError(f"{one.letter} answered {len(answers)} of {len(given.cells)} cells")
            if len(answers) > len(first):  # what all cells say is what samples are compared with
                first, answers = answers, first or answers
            if wrong := disagreement(first, answers):
                raise AssertionError(f"{workload.name}, contender {one.letter}: {wrong}")
            yield Timing(letter=one.letter, round=number, cells=len(given.cells), wall_s=wall, cpu_s=cpu)
