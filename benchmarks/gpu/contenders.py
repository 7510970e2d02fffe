"""Who runs on the device: four of the contenders of `benchmarks.speed`, and ours into a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed import ours
from benchmarks.speed.contenders import CONTENDERS as ALL
from benchmarks.speed.measure import Contender
from benchmarks.speed.workloads import Answers, Workload
from patchscope_nn.models import Model


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender, whose answers are collected after its time is taken.

    Attributes:
        contender: What it is, and which part of a workload it runs.
        run: From a workload, a model and an empty folder to a result.
        answers: From the result and the workload to the answers.
    """

    contender: Contender
    run: Callable[[Workload, Model, Path], Any]
    answers: Callable[[Any, Workload], Answers]

    @property
    def letter(self) -> str:
        """How tables call it."""
        return self.contender.letter


def _whole(letter: str) -> Entry:
    """A contender whose result is its answers."""
    one = ALL[letter]
    return Entry(
        contender=one,
        run=lambda workload, model, _folder: one.run(workload, model, model),
        answers=lambda result, _workload: result,
    )


def _in_memory(workload: Workload, model: Model, _folder: Path) -> Any:
    return ours.start(workload, model, model)


def _into_folder(workload: Workload, model: Model, folder: Path) -> Any:
    return ours.start(workload, model, model, out=folder / "run")


FLOOR, OURS, FOLDER = "f", "e", "e2"
#: The floor is first: the answers of the others are compared with its answers.
ENTRIES = (
    _whole(FLOOR),
    Entry(contender=ALL[OURS], run=_in_memory, answers=ours.answers_of),
    Entry(
        contender=Contender(letter=FOLDER, title="ours, into a folder with its report", run=ours.run),
        run=_into_folder,
        answers=ours.answers_of,
    ),
    _whole("c"),
    _whole("a"),
)
