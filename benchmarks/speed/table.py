"""Raw figures as a table to read."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.speed.contenders import CONTENDERS
from benchmarks.speed.measure import Timing
from benchmarks.speed.workloads import Workload

OURS, FLOOR = "e", "f"


def ratio(timings: Sequence[Timing], one: str, other: str, unit: str) -> float | None:
    """How many times as long `one` takes as `other`: the median over rounds of both in the same round."""
    of = {(timing.letter, timing.round): getattr(timing, unit) for timing in timings}
    pairs = [(of[one, number], of.get((other, number))) for letter, number in of if letter == one]
    found = [first / second for first, second in pairs if second]
    return statistics.median(found) if found else None


def speed(workloads: Sequence[Workload], timings: Sequence[Timing]) -> Iterator[str]:
    """A table for each workload, line by line."""
    for workload in workloads:
        mine = [timing for timing in timings if timing.workload == workload.name]
        letters = [letter for letter in CONTENDERS if any(one.letter == letter for one in mine)]
        yield f"### {workload.name}: {workload.title}"
        yield ""
        yield f"{len(workload.cells):,} cells."
        yield ""
        yield from _table(
            ("", "contender", "timed on", "wall s", "CPU s", "wall / ours", "CPU / ours", "CPU / floor"),
            [_row(letter, mine) for letter in letters],
        )
        yield ""


def _row(letter: str, timings: Sequence[Timing]) -> tuple[str, ...]:
    own = [timing for timing in timings if timing.letter == letter]
    cells, of_cells = own[0].cells, own[0].of_cells
    return (
        letter,
        CONTENDERS[letter].title,
        "all" if cells == of_cells else f"{cells} cells, scaled",
        _number(statistics.median(one.wall_s for one in own)),
        _number(statistics.median(one.cpu_s for one in own)),
        _number(ratio(timings, letter, OURS, "wall_s")),
        _number(ratio(timings, letter, OURS, "cpu_s")),
        _number(ratio(timings, letter, FLOOR, "cpu_s")),
    )


def growth(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of growth, line by line."""
    if not points:
        return
    yield "### Growth of ours"
    yield ""
    yield (
        "Each line is a process of its own. Memory is what the process holds; before the run that is the "
        "model and its libraries. The budget that was set for a pass is "
        f"{_mib(points[0]['memory_budget'])} MiB."
    )
    yield ""
    yield from _table(
        (
            *("workload", "times", "cells", "wall s / 1,000 cells", "CPU s / 1,000 cells"),
            *("MiB before", "MiB at most", "MiB more"),
        ),
        [
            (
                *(one["workload"], str(one["times"]), f"{one['cells']:,}"),
                *(_number(one[f"{unit}_s_per_thousand"]) for unit in ("wall", "cpu")),
                *(_mib(one["resident_before"]), _mib(one["resident_peak"])),
                _mib(one["resident_peak"] - one["resident_before"]),
            )
            for one in points
        ],
    )


def document(machine: Mapping[str, Any], tables: Sequence[str]) -> str:
    """The whole page."""
    facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in machine.items()]
    note = (
        "Times are medians over rounds in which the contenders took turns; ratios are medians of the ratios "
        "within a round. Contenders timed on some of the cells are scaled to all. All answers agree: the "
        "same top tokens or texts, log-probabilities to 1e-4. What each contender is: `benchmarks/README.md`."
    )
    return "\n".join(["## Speed", "", *facts, "", note, "", *tables]).rstrip() + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 (three digits)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"
