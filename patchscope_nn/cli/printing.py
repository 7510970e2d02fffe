"""What the command line prints: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import importlib.util
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
    from patchscope_nn.backends.jobs.job_log import Job
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
    """Print a message that is not a result."""
    sys.stderr.write(f"{text}\n")


def caution(text: str) -> None:
    """Print a note that matters for interpreting a result."""
    note(f"note: {text}")


def out_json(value: Any) -> None:
    """Print a result as JSON."""
    out(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(error: PatchscopeError, *, as_json: bool) -> None:
    """Print an error of the package and its hint."""
    if as_json:
        problems = [asdict(problem) for problem in error.problems] if isinstance(error, SpecError) else []
        out_json({"error": error.message, "hint": error.hint, "problems": problems})
    else:
        note(f"error: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""))


@contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """Show a status line on a terminal while the block runs."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


class Progress:
    """Show progress: a bar on a terminal, elsewhere a plain line every few seconds."""

    def __init__(self, what: str, *, quiet: bool, unit: str = "cells") -> None:
        self.what, self.quiet, self.unit = what, quiet, unit
        self._bar: Any = None
        self._line = ""
        self._started = self._last_note = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` units are done."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._show(done, total)
            return
        now = time.monotonic()
        if done == total or now - self._last_note >= _PLAIN_EVERY_S:
            self._last_note = now
            note(f"{self.what}: {done} of {total} {self.unit}, {now - self._started:.0f} s")

    def tell(self, line: str) -> None:
        """Show the state of the jobs on a server, in the bar or as a separate line."""
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


def existing(folder: Path | None, name: str) -> str | None:
    """Return the path of a page in a folder; None if there is no folder or no page."""
    page = folder / name if folder else None
    return str(page) if page and page.exists() else None


def how_to_report(folder: Path | None) -> str:
    """Return the command that writes a page that a folder lacks, or that installs what it needs."""
    installed = importlib.util.find_spec("plotly")
    return f"patchscope report {folder}" if installed else "pip install 'patchscope-nn[report]'"


def grid(*headers: str, title: str | None = None) -> Any:
    """Return an empty table without lines, with these headers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def show(*renderables: Any) -> None:
    """Print texts and tables, fitted to the width of the terminal."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for renderable in renderables:
        console.print(renderable, markup=False)


def _cell(text: str) -> Any:
    """Prepare generated text for a terminal: without markup, and with control characters made visible."""
    from rich.text import Text

    visible = "".join(
        char if char.isprintable() else {"\n": "⏎", "\t": "→"}.get(char, f"\\x{ord(char):02x}")
        for char in text
    )
    return Text(visible)


def print_look(look: Look, *, as_json: bool) -> None:
    """Print the result of `explain`: the unpatched control, then layer by layer."""
    if as_json:
        out_json(asdict(look))
        return
    same = all(entry.layer == entry.target_layer for entry in look.says)
    table = grid("layer" if same else "layer -> layer", "the model says it is", "next token", "p")
    for entry in look.says:
        name, style = "unpatched", "dim"
        if entry.layer is not None:
            layer, style = "embed" if entry.layer < 0 else str(entry.layer), ""
            name = layer if same else f"{layer} -> {entry.target_layer}"
        description = _cell(entry.error or entry.text.strip(" :\n") or "…")
        probability = "" if entry.probability is None else f"{entry.probability:.2f}"
        table.add_row(name, description, _cell(entry.next_token), probability, style=style)
    places = zip(look.position, look.token, strict=True)
    tokens = ", ".join(f"{position} {token!r}" for position, token in places)
    show(_cell(f"{look.model} on {look.prompt!r}, token {tokens}"), "", table)


def print_recipes(counted: Sequence[tuple[Recipe, Cost | str]], *, as_json: bool) -> None:
    """Print the included recipes, each with its cost or the reason why it cannot be counted."""
    if as_json:
        out_json([_counted(recipe, cost) for recipe, cost in counted])
        return
    table = grid("name", "question", "paper", "rows", "cells", "decoded")
    for column in table.columns[3:]:
        column.justify, column.no_wrap = "right", True
    for recipe, cost in counted:
        numbers = ("?",) * 3 if isinstance(cost, str) else (f"{number:,}" for number in cost[:3])
        fits = " (a mapping is fitted first)" if not isinstance(cost, str) and cost.fits else ""
        table.add_row(recipe.name, recipe.title + fits, recipe.paper or "", *numbers)
    what = "data rows, cells and maximum of decoded tokens of the whole recipe; --limit uses fewer rows"
    show(table, "", what)
    for reason in dict.fromkeys(cost for _, cost in counted if isinstance(cost, str)):
        show(f"?: {reason}")


def _counted(recipe: Recipe, cost: Cost | str) -> dict[str, Any]:
    record = {"name": recipe.name, "title": recipe.title, "paper": recipe.paper, "model": recipe.model}
    if isinstance(cost, str):
        return record | {"cost": None, "uncounted": cost}
    return record | {"cost": cost._asdict()}


def print_problems(by_file: Mapping[str, Sequence[Problem]], *, as_json: bool) -> None:
    """Print the problems of recipe files, as `file:line: field: message`."""
    if as_json:
        out_json({file: [asdict(problem) for problem in problems] for file, problems in by_file.items()})
        return
    for file, problems in by_file.items():
        if not problems:
            out(f"{file}: ok")
        for problem in problems:
            line = f":{problem.line}" if problem.line is not None else ""
            out(f"{file}{line}: {problem.field + ': ' if problem.field else ''}{problem.message}")


def print_jobs(jobs: Sequence[Job], *, as_json: bool) -> None:
    """Print the jobs of a run."""
    if as_json:
        out_json([asdict(job) | {"cells": len(job.cells), "passes": len(job.passes)} for job in jobs])
        return
    table = grid("job", "server", "cells", "sent", "state", "")
    for job in jobs:
        messages = job.said.strip().splitlines()
        last = messages[-1] if messages else ""
        table.add_row(job.id, job.host, str(len(job.cells)), job.sent, job.state, _cell(last))
    show(table if jobs else "This run sent no jobs.")


def print_findings(findings: Sequence[Finding], *, verdict: Verdict | None, as_json: bool) -> None:
    """Print the doctor's findings, and the verdict of a model's proof."""
    if as_json:
        proof = {} if verdict is None else {"proof": verdict.dump()}
        out_json([finding._asdict() | (proof if finding.what == "model" else {}) for finding in findings])
        return
    table = grid("", "check", "found", "how to fix it")
    for finding in findings:
        table.add_row(finding.state, finding.what, _cell(finding.found), finding.mend)
    show(table)
    if verdict is not None:
        show(_proof_table(verdict))


def _proof_table(verdict: Verdict) -> Any:
    """Return the table of the proof's comparisons; differences are in standard deviations of the logits."""
    table = grid("compared with plain hooks", "blocks", "tokens", "difference", "rounding", "outcome")
    for what, blocks, tokens, *differences, outcome in verdict.comparisons:
        error, tolerance = (f"{number:.1e}" for number in differences)
        table.add_row(what, str(blocks), str(tokens), error, tolerance, _cell(outcome))
    return table


def print_report(pages: Sequence[Path], *, figures: Sequence[Path], as_json: bool) -> None:
    """Print the paths of a report, of the reports of an experiment's methods, and of figures."""
    if as_json:
        first, *others = map(str, pages)
        methods = {"methods": others} if others else {}
        written = {"figures": list(map(str, figures))} if figures else {}
        out_json({"report": first, **methods, **written})
    else:
        for file in (*pages, *figures):
            out(str(file))
