"""Measuring: contenders take turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.speed.workloads import Answers, Workload, disagreement
from patchscope_nn.models import Model

Run = Callable[[Workload, Model, Model], Answers]
#: How many cells each contender runs before its time counts.
_WARM = 30
#: So many cells are enough of a batched contender: those of fewer prompts.
_MANY = 1000


class DisagreementError(AssertionError):
    """Two contenders say different things of one cell."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run a sweep.

    Attributes:
        letter: How tables call it.
        title: What it is.
        run: It.
        sampled: What it may be timed on instead of all: single `cells`; a smaller `sweep`; of long workloads
            some of the `targets`, the l*, and of large ones a smaller sweep. None where it always runs all.
    """

    letter: str
    title: str
    run: Run
    sampled: Literal["cells", "sweep", "targets"] | None = None

    def given(self, workload: Workload, count: int | None) -> Workload:
        """What it is given to run of a workload."""
        if count is None or count >= len(workload.cells):
            return workload
        if self.sampled == "cells":
            return workload.sample(count)
        if self.sampled == "sweep":
            return workload.smaller(count)
        if self.sampled == "targets" and workload.long:
            return workload.fewer_targets(count)
        if self.sampled == "targets" and len(workload.cells) > _MANY:
            return workload.smaller(_MANY)
        return workload


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One run of one contender.

    Attributes:
        workload: Its name.
        letter: The contender.
        round: Which round.
        cells: How many cells it ran.
        of_cells: How many the workload has.
        wall_s: Seconds for all cells; of a sample, scaled.
        cpu_s: Seconds of processor time, of all threads; scaled the same.
    """

    workload: str
    letter: str
    round: int
    cells: int
    of_cells: int
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
        pairs: How many rounds.
        sample: How many cells the slow ones run; None for all.

    Yields:
        Each run's timing.

    Raises:
        DisagreementError: Two of them say different things.
    """
    agreed: Answers = {}
    for one in contenders:
        one.run(one.given(workload.smaller(_WARM), _WARM // 10), source, target)
    for number in range(pairs):
        for one in contenders:
            given = one.given(workload, sample)
            answers, wall, cpu = timed(lambda one=one, given=given: one.run(given, source, target))
            check(agreed, answers, given, one)
            agreed = {**answers, **agreed}
            scale = len(workload.cells) / len(given.cells)
            yield Timing(
                workload=workload.name,
                letter=one.letter,
                round=number,
                cells=len(given.cells),
                of_cells=len(workload.cells),
                wall_s=wall * scale,
                cpu_s=cpu * scale,
            )


def check(
    agreed: Answers, answers: Answers, given: Workload, one: Contender, *, tolerance: float = 1e-4
) -> None:
    """That a contender answered the cells it was given, and as those before it did."""
    if answers.keys() != set(given.cells):
        raise DisagreementError(f"{given.name}: {one.letter} answered other cells than it was given.")
    if wrong := disagreement(agreed, answers, tolerance=tolerance):
        raise DisagreementError(f"{given.name}: {one.letter} ({one.title}): {wrong}.")
