"""Raw figures as a table to read."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.speed.contenders import CONTENDERS
from benchmarks.speed.machine import MACHINE
from benchmarks.speed.measure import Timing

OURS, FLOOR = "e", "f"


def ratio(timings: Sequence[Timing], one: str, other: str, unit: str) -> float | None:
    """How many times as long `one` takes as `other`: the median over rounds of both in the same round."""
    of = {(timing.letter, timing.round): getattr(timing, unit) for timing in timings}
    pairs = [(of[one, number], of.get((other, number))) for letter, number in of if letter == one]
    found = [first / second for first, second in pairs if second]
    return statistics.median(found) if found else None


def speed(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    """The table of a workload, line by line."""
    timings = [Timing(**one) for one in part["timings"]]
    letters = [letter for letter in CONTENDERS if any(one.letter == letter for one in timings)]
    rounds = 1 + max(one.round for one in timings)
    yield f"### {name}: {part['title']}"
    yield ""
    yield f"{part['cells']:,} cells, {rounds} rounds. {_how(part)}"
    yield ""
    yield from markdown(
        ("", "contender", "timed on", "wall s", "CPU s", "wall / ours", "CPU / ours", "CPU / floor"),
        [_row(letter, timings) for letter in letters],
    )
    yield ""


def _how(part: Mapping[str, Any]) -> str:
    """The command of a part, and when it ran."""
    return f"`{part['command']}`, {part['date']}, load at start {part['load_at_start']}."


def _row(letter: str, timings: Sequence[Timing]) -> tuple[str, ...]:
    own = [timing for timing in timings if timing.letter == letter]
    cells, of_cells = own[0].cells, own[0].of_cells
    return (
        letter,
        CONTENDERS[letter].title,
        "all" if cells == of_cells else f"{cells} cells, scaled",
        number(statistics.median(one.wall_s for one in own)),
        number(statistics.median(one.cpu_s for one in own)),
        number(ratio(timings, letter, OURS, "wall_s")),
        number(ratio(timings, letter, OURS, "cpu_s")),
        number(ratio(timings, letter, FLOOR, "cpu_s")),
    )


def growth(part: Mapping[str, Any]) -> Iterator[str]:
    """The table of growth, line by line."""
    points = part["growth"]
    yield "### Growth of ours"
    yield ""
    yield (
        f"{_how(part)} Each line is a process of its own. "
        "Memory is what the process holds; before the run that is the model and its libraries. "
        "The budget that was set for a pass is "
        f"{_mib(points[0]['memory_budget'])} MiB."
    )
    yield ""
    yield from markdown(
        (
            *("workload", "times", "cells", "wall s / 1,000 cells", "CPU s / 1,000 cells"),
            *("MiB before", "MiB at most", "MiB more"),
        ),
        [
            (
                *(one["workload"], str(one["times"]), f"{one['cells']:,}"),
                *(number(one[f"{unit}_s_per_thousand"]) for unit in ("wall", "cpu")),
                *(_mib(one["resident_before"]), _mib(one["resident_peak"])),
                _mib(one["resident_peak"] - one["resident_before"]),
            )
            for one in points
        ],
    )


def document(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page, of parts by their names: workloads, and `growth`. The machine is the latest part's."""
    latest = max(parts.values(), key=lambda part: part["date"])
    facts = [f"- {name.replace('_', ' ')}: {latest[name]}" for name in MACHINE]
    tables = [
        line
        for name, part in parts.items()
        for line in (growth(part) if name == "growth" else speed(name, part))
    ]
    note = (
        "Times are medians over rounds in which the contenders took turns; ratios are medians of the ratios "
        "within a round. Contenders timed on some of the cells are scaled to all. All answers agree: the "
        "same top tokens or texts, log-probabilities to 1e-4. What each contender is: `benchmarks/README.md`."
    )
    return "\n".join(["## Speed", "", *facts, "", note, "", *tables]).rstrip() + "\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, line by line."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 (three digits)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"
