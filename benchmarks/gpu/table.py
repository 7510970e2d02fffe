"""The figures of a device as a page to read, with the goals beside what was reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.contenders import FLOOR, FOLDER, OURS
from benchmarks.gpu.measure import TOLERANCE, Figures
from benchmarks.speed.machine import MACHINE
from benchmarks.speed.table import markdown, number

_DEVICE = ("device", "cuda")
_HEAD = ("", "contender", "timed on", "cells / s", "wall s", "busy", "GiB more", "as the floor", "nats off")
_NOTE = f"""\
Models have random weights, made on the device. "Busy" is the share of a run's wall time in which a
kernel runs: the union of the kernels' intervals, in a run under the profiler, which makes the host
slower. "GiB more" is the peak of allocated memory beyond the model. "Wall s" is the median of the
rounds, for all cells. Slow contenders ran a part of the cells, once, after a warm-up; their times and
speeds are scaled to all cells. Before timing, all contenders gave the same tokens and texts, and
log-probabilities within {TOLERANCE:g} nats, on small workloads of a float32 model of the same width with
fewer blocks. "As the floor" counts the cells that say the same as the floor at the measured precision,
where rounding alone changes tokens that are nearly as likely. "Nats off" is the largest difference in
log-probability where the tokens are the same. What each contender is: `benchmarks/README.md`."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure that is to be reached.

    Attributes:
        shape: The model.
        workload: The workload.
        title: The goal in words.
        reached: From the figures by letter to the figure that was reached; None if one is missing.
        limit: The goal.
        at_least: Whether the figure should be the limit or more; False if it should be the limit or less.
        shown: How the figure is written.
    """

    shape: str
    workload: str
    title: str
    reached: Callable[[Mapping[str, Figures]], float | None]
    limit: float
    at_least: bool = False
    shown: str = "{:.2f} s"


def _busy(letter: str) -> Callable[[Mapping[str, Figures]], float | None]:
    return lambda found: found[letter].busy if letter in found else None


def _wall(found: Mapping[str, Figures]) -> float | None:
    return found[OURS].wall_s if OURS in found else None


def _of_floor(found: Mapping[str, Figures]) -> float | None:
    ours, floor = (found[letter].wall_s if letter in found else None for letter in (OURS, FLOOR))
    return None if ours is None or floor is None else ours / floor


def _is_busy(contexts: int, letter: str, title: str, limit: float) -> Goal:
    return Goal(
        shape="llama-8b",
        workload=f"W2-{contexts}",
        title=title,
        reached=_busy(letter),
        limit=limit,
        at_least=True,
        shown="{:.0%}",
    )


GOALS = (
    Goal(
        shape="llama-8b",
        workload="W1",
        title="within 1.5 times the floor",
        reached=_of_floor,
        limit=1.5,
        shown="{:.2f} times",
    ),
    _is_busy(512, OURS, "busy at least 70 %", 0.7),
    _is_busy(512, FOLDER, "busy at least 50 % into a folder", 0.5),
    _is_busy(1800, OURS, "busy at least 70 %", 0.7),
    _is_busy(1800, FOLDER, "busy at least 50 % into a folder", 0.5),
    Goal(shape="llama-8b", workload="W3", title="2,048 cells in 1.0 s", reached=_wall, limit=1.0),
    Goal(shape="32b", workload="W6", title="256 texts in 6 s", reached=_wall, limit=6.0),
)


def document(parts: Sequence[Mapping[str, Any]]) -> str:
    """The whole page, of parts: one for each workload of each shape. The machine is the latest part's."""
    latest = max(parts, key=lambda part: part["date"])
    facts = [f"- {name.replace('_', ' ')}: {latest[name]}" for name in (*_DEVICE, *MACHINE)]
    lines = ["## Speed on a GPU", ""]
    if any(part["rehearsal"] for part in parts):
        lines += ["**A rehearsal with a tiny model: these are not figures of a GPU.**", ""]
    lines += [*facts, "", _NOTE, ""]
    if goals := [row for part in parts for row in _goals(part)]:
        lines += [*markdown(("goal", "reached", ""), goals), ""]
    lines += [line for part in parts for line in _part(part)]
    return "\n".join(lines).rstrip() + "\n"


def _goals(part: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    found = {one["letter"]: Figures(**one) for one in part["figures"]}
    for goal in GOALS:
        if (goal.shape, goal.workload) == (part["shape"], part["workload"]):
            reached = goal.reached(found)
            title = f"{goal.shape}, {goal.workload}: {goal.title}"
            if reached is None:
                yield title, "not measured", ""
            else:
                met = reached >= goal.limit if goal.at_least else reached <= goal.limit
                yield title, goal.shown.format(reached), "met" if met else "missed"


def _part(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {part['workload']}, {part['shape_title']}: {part['title']}"
    yield ""
    yield (
        f"{part['cells']:,} cells, {part['dtype']}. `{part['command']}`, {part['date']}, {part['device']}. "
        f"{part['proof']}"
    )
    yield ""
    yield from markdown(_HEAD, [_row(Figures(**one)) for one in part["figures"]])
    yield ""


def _row(one: Figures) -> tuple[str, ...]:
    wall = one.wall_s
    some = "all" if one.cells == one.of_cells else f"{one.cells:,} cells, scaled"
    if wall is None:
        return (one.letter, one.title, some, "out of memory", *("" for _ in _HEAD[4:]))
    return (
        one.letter,
        one.title,
        some,
        number(one.of_cells / wall),
        number(wall),
        "n/a" if one.busy is None else f"{one.busy:.0%}",
        "n/a" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f}",
        f"{one.same:,} of {one.compared:,}",
        "" if one.worst is None else f"{one.worst:.1e}",
    )
