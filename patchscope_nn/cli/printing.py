"""What the command line prints: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscope_nn.errors import PatchscopeError, Problem, SpecError

if TYPE_CHECKING:
    from patchscope_nn.backends.ndif.job_log import Job
    from patchscope_nn.models import Verdict
    from patchscope_nn.recipe import Recipe
    from patchscope_nn.runs.costs import Cost
    from patchscope_nn.runs.doctor import Finding
    from patchscope_nn.runs.explain import Look

_PLAIN_EVERY_S = 5.0


def out(text: str) -> None:
    """Print a result."""
    sys.stdout.write(f"{text}\n")


def note(text: str) -> None:
    """Print something that is no result."""
    sys.stderr.write(f"{text}\n")


def caution(text: str) -> None:
    """Print what a researcher should know of a result."""
    note(f"note: {text}")


def out_json(value: Any) -> None:
    """Print a result as JSON."""
    out(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(error: PatchscopeError, *, as_json: bool) -> None:
    """Print an error of the package: what was wrong, and what to do."""
    if as_json:
        found = error.problems if isinstance(error, SpecError) else ()
        said = {"error": error.message, "hint": error.hint, "problems": [asdict(one) for one in found]}
        out_json(said)
    else:
        note(f"error: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""))


@contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """Say what takes its time."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


class Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds.

    Args:
        what: What is being done.
        quiet: Print nothing.
        unit: What is counted.
    """

    def __init__(self, what: str, *, quiet: bool, unit: str = "cells") -> None:
        self.what, self.quiet, self.unit = what, quiet, unit
        self._bar: Any = None
        self._line = ""
        self._started = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._show(done, total)
            return
        now = time.monotonic()
        if done == total or now - self._said >= _PLAIN_EVERY_S:
            self._said = now
            note(f"{self.what}: {done} of {total} {self.unit}, {now - self._started:.0f} s")

    def tell(self, line: str) -> None:
        """Say what the jobs on a server do: in the bar, or elsewhere as a line of its own."""
        if self.quiet or line == self._line:
            return
        self._line = line
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=f"{self.what} ({line})")
        elif not sys.stderr.isatty():
            note(f"{self.what}: {line}")

    def _show(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self.what, total=total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        if done == total:
            self._bar.stop()


def grid(*headers: str, title: str | None = None) -> Any:
    """A table without lines, with these headers and no row yet."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def show(*things: Any) -> None:
    """Print texts and tables, as wide as the terminal is."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for thing in things:
        console.print(thing, markup=False)


def mean_text(found: Mapping[str, Any] | None, *, sign: str = "") -> str:
    """A mean with its interval, of which a single row has none; `sign` is that of a format."""
    from patchscope_nn.analysis.statistics import is_null

    if found is None or is_null(found["mean"]):
        return ""
    low, high = found["low"], found["high"]
    spread = "" if is_null(low) else f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return f"{found['mean']:{sign}.2f}{spread}"


def _cell(text: str) -> Any:
    """Model text for a terminal: nothing of it is markup, and control characters are shown, not obeyed."""
    from rich.text import Text

    shown = "".join(
        char if char.isprintable() else {"\n": "⏎", "\t": "→"}.get(char, f"\\x{ord(char):02x}")
        for char in text
    )
    return Text(shown)


def print_look(look: Look, *, as_json: bool) -> None:
    """Print a quick look: the unpatched control on top, then layer by layer."""
    if as_json:
        out_json(asdict(look))
        return
    same = all(one.layer == one.target_layer for one in look.says)
    table = grid("layer" if same else "layer -> layer", "the model says it is", "next token", "p")
    for one in look.says:
        if one.layer is None:
            name = "unpatched"
        else:
            layer = "embed" if one.layer < 0 else str(one.layer)
            name = layer if same else f"{layer} -> {one.target_layer}"
        style = "dim" if one.layer is None else None
        said = _cell(one.error or one.text.strip(" :\n") or "…")
        probability = "" if one.probability is None else f"{one.probability:.2f}"
        table.add_row(name, said, _cell(one.next_token), probability, style=style)
    where = ", ".join(f"{at} {token!r}" for at, token in zip(look.position, look.token, strict=True))
    show(_cell(f"{look.model} on {look.prompt!r}, token {where}"), "", table)


def print_recipes(counted: Sequence[tuple[Recipe, Cost | str]], *, as_json: bool) -> None:
    """Print the recipes that ship, each with its cost, or with why that cannot be counted."""
    if as_json:
        out_json([_counted(*one) for one in counted])
        return
    table = grid("name", "what it asks", "from", "rows", "cells", "decoded")
    for column in table.columns[3:]:
        column.justify, column.no_wrap = "right", True
    for one, cost in counted:
        numbers = ("?",) * 3 if isinstance(cost, str) else (f"{number:,}" for number in cost[:3])
        fits = " (a mapping is fitted first)" if not isinstance(cost, str) and cost.fits else ""
        table.add_row(one.name, one.title + fits, one.paper or "", *numbers)
    show(table, "", "data rows, cells and the most decoded tokens of the whole recipe; --limit takes fewer")
    for why in dict.fromkeys(cost for _, cost in counted if isinstance(cost, str)):
        show(f"?: {why}")


def _counted(recipe: Recipe, cost: Cost | str) -> dict[str, Any]:
    said = {"name": recipe.name, "title": recipe.title, "paper": recipe.paper, "model": recipe.model}
    if isinstance(cost, str):
        return said | {"cost": None, "uncounted": cost}
    return said | {"cost": cost._asdict()}


def print_problems(found: Mapping[str, Sequence[Problem]], *, as_json: bool) -> None:
    """Print the problems of recipe files, as `file:line: field: message`."""
    if as_json:
        out_json({file: [asdict(one) for one in problems] for file, problems in found.items()})
        return
    for file, problems in found.items():
        if not problems:
            out(f"{file}: ok")
        for one in problems:
            line = f":{one.line}" if one.line is not None else ""
            out(f"{file}{line}: {one.field + ': ' if one.field else ''}{one.message}")


def print_jobs(jobs: Sequence[Job], *, as_json: bool) -> None:
    """Print the jobs of a run."""
    if as_json:
        out_json([asdict(job) | {"cells": len(job.cells), "passes": len(job.passes)} for job in jobs])
        return
    table = grid("job", "server", "cells", "sent", "state", "")
    for job in jobs:
        said = job.said.strip().splitlines()
        last = said[-1] if said else ""
        table.add_row(job.id, job.host, str(len(job.cells)), job.sent, job.state, _cell(last))
    show(table if jobs else "This run sent no jobs.")


def print_findings(findings: Sequence[Finding], *, verdict: Verdict | None, as_json: bool) -> None:
    """Print what the doctor found, and the verdict of a model's proof."""
    if as_json:
        proof = {} if verdict is None else {"proof": verdict.dump()}
        out_json([finding._asdict() | (proof if finding.what == "model" else {}) for finding in findings])
        return
    table = grid("", "what", "found", "what mends it")
    for finding in findings:
        table.add_row(finding.state, finding.what, _cell(finding.found), finding.mend)
    show(table)
    if verdict is not None:
        show(_proof_table(verdict))


def _proof_table(verdict: Verdict) -> Any:
    """What the proof compared, with differences in standard deviations of the logits."""
    table = grid("compared with plain hooks", "blocks", "tokens", "difference", "rounding", "outcome")
    for what, blocks, tokens, *differences, outcome in verdict.comparisons:
        error, tolerance = (f"{number:.1e}" for number in differences)
        table.add_row(what, str(blocks), str(tokens), error, tolerance, _cell(outcome))
    return table


def print_report(pages: Sequence[Path], *, figures: Sequence[Path], as_json: bool) -> None:
    """Print where a report is, those of an experiment's methods, and the figures that were asked for."""
    if as_json:
        first, *others = map(str, pages)
        methods = {"methods": others} if others else {}
        written = {"figures": list(map(str, figures))} if figures else {}
        out_json({"report": first, **methods, **written})
    else:
        for file in (*pages, *figures):
            out(str(file))
