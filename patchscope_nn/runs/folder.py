"""Runs: the folder one execution leaves, and what is read back from it.

    manifest.json   what ran: the recipe, its hash, models, versions, seed, timings
    cells.jsonl     one line for each finished cell, while running; kept afterwards
    probe.json      what a probe says of the cells, where the recipe has one
    cells.parquet   the table, at the end
    ensemble.csv    what several target prompts say together, at the end, where there are several
    report.html     the report, at the end

A folder belongs to one hash: another recipe never continues it. A line that a killed process left half
written is cut off, and its cell is run again. Cells are read back from their lines when they are asked for,
so that a run of a hundred thousand holds none of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from patchscope_nn._util.arguments import checked, checked_class
from patchscope_nn.errors import FolderError, InputError
from patchscope_nn.recipe import PROBE_METRICS
from patchscope_nn.runs.lazy_rows import Lines, Widened
from patchscope_nn.analysis.tables import frame, light_frame, write_parquet

MANIFEST, LINES, TABLE, REPORT = "manifest.json", "cells.jsonl", "cells.parquet", "report.html"
ENSEMBLE = "ensemble.csv"
PROBE = "probe.json"
_LOCK = ".lock"
Manifest = dict[str, Any]


class InMemory:
    """A store for a run that leaves no folder.

    Attributes:
        path: None.
        manifest: None; there is no earlier one.
        done: The numbers of the cells finished so far.
    """

    path: Path | None = None
    manifest: Manifest | None = None

    def __init__(self) -> None:
        self.done: set[int] = set()
        self._rows: dict[int, Mapping[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def append(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Keep finished cells: table rows by the number of their cell."""
        self._rows.update(rows)
        self.done.update(rows)

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of the finished cells, in the order of the sweep."""
        return tuple(self._rows[number] for number in sorted(self._rows))

    def probed(self, asked: Any) -> Mapping[str, Sequence[Any]] | None:  # noqa: ARG002 (a folder's business)
        """What an earlier session's probe said of these cells."""
        return None

    def keep_probed(self, asked: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Nothing is kept."""

    def finish(self, run: Run) -> None:
        """Nothing more is to be written."""


class RunFolder(InMemory):
    """A run folder that is being written, by one process at a time.

    Attributes:
        path: The folder.
        manifest: What an earlier session wrote, or this one did.
        done: The numbers of the cells finished so far.
    """

    def __init__(self, path: Path, manifest: Manifest, lines: Lines) -> None:
        self.path: Path = path
        self.manifest: Manifest = manifest
        self.done = set(lines.numbers())
        self._lines = lines

    def append(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Write finished cells, so that no later death of this process loses them."""
        lines = {
            number: json.dumps({"cell": number, **row}, ensure_ascii=False).encode() + b"\n"
            for number, row in rows.items()
        }
        with (self.path / LINES).open("ab") as stream:
            stream.write(b"".join(lines.values()))
            stream.flush()
            os.fsync(stream.fileno())
        for number, line in lines.items():
            self._lines.add(number, len(line))
        self.done.update(rows)

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of the finished cells, read from the folder when they are asked for."""
        return self._lines

    def probed(self, asked: Any) -> Mapping[str, Sequence[Any]] | None:
        """What an earlier session's probe said; None where it was another, or of other cells."""
        return _probed(self.path, asked, n_cells=len(self._lines))

    def keep_probed(self, asked: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write what a probe said."""
        partial = self.path / f".{PROBE}.partial"
        partial.write_text(json.dumps({"probe": asked, "columns": columns}) + "\n", encoding="utf-8")
        partial.replace(self.path / PROBE)

    def finish(self, run: Run) -> None:
        """Write the table and the manifest of a run that is done."""
        partial = self.path / f".{TABLE}.partial"
        write_parquet(run.rows, run.manifest["columns"], partial)
        partial.replace(self.path / TABLE)
        write_manifest(self.path, run.manifest)


@contextmanager
def open_folder(path: Path, manifest: Manifest) -> Iterator[RunFolder]:
    """Create a run's folder, or go on with it, alone.

    Args:
        path: The folder.
        manifest: What is about to run; its `hash` is the run's identity.

    Yields:
        The folder, with the cells that are done.

    Raises:
        FolderError: The folder belongs to another run or to something else, or another process writes it.
    """
    import filelock

    _check_owner(path, manifest["hash"])
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{path} cannot be made: {error.strerror}.", hint="Give another --out.") from error
    lock = filelock.FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FolderError(
            f"{path} is being written by another process.", hint="Wait for it, or give another --out."
        ) from None
    try:
        lines = Lines(path / LINES)
        if (path / LINES).exists():
            os.truncate(path / LINES, lines.size)
        if (path / MANIFEST).exists():
            manifest = read_manifest(path)
        else:
            write_manifest(path, manifest)
        yield RunFolder(path, manifest, lines)
    finally:
        lock.release()


def _check_owner(path: Path, digest: str) -> None:
    if path.exists() and not path.is_dir():
        raise FolderError(f"{path} is a file.", hint="Give a folder as --out.")
    if (path / MANIFEST).exists():
        theirs = read_manifest(path).get("hash")
        if theirs != digest:
            raise FolderError(
                f"{path} holds another run (hash {theirs}, this one is {digest}).",
                hint="Give another --out, or run the same recipe, options and model to go on with it.",
            )
    elif path.exists() and any(entry.name != _LOCK for entry in path.iterdir()):
        raise FolderError(f"{path} is not empty and holds no run.", hint="Give another --out.")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace a folder's manifest, whole."""
    partial = path / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path / MANIFEST)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run folder.

    Raises:
        FolderError: There is none, or it cannot be read.
    """
    file = path / MANIFEST
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FolderError(
            f"{path} is no run folder: it has no {MANIFEST}.", hint="`patchscope run` prints a run's folder."
        ) from None
    except (OSError, ValueError) as error:
        raise FolderError(f"{file} cannot be read: {error}.") from error


@checked_class
@dataclass(frozen=True, kw_only=True)
class Run:
    """One execution: what ran and what came out.

    Attributes:
        manifest: What ran, as `manifest.json` holds it.
        rows: One mapping for each cell, in the order of the sweep; with a folder, read when asked for.
        path: Its folder; None where it was kept in memory.
    """

    manifest: Manifest
    rows: Sequence[Mapping[str, Any]]
    path: Path | None = None

    def __repr__(self) -> str:
        where = f" in {self.path}" if self.path else ""
        return (
            f"<Run {self.manifest['recipe']['name']} {self.manifest['hash']}: {len(self.rows)} cells{where}>"
        )

    def table(self) -> Any:
        """The cells as a tidy pandas DataFrame, one row for each."""
        return frame(self.rows, self.manifest["columns"])

    def heatmap(self, *, value: str | None = None) -> Any:
        """What the states say, source prompts x layers, as a plotly Figure.

        Args:
            value: The column that shades the cells; None takes the one that fits the readout.

        Raises:
            InputError: plotly is not installed, or there is no such column.
        """
        from patchscope_nn.report.figures import text_heatmap

        return text_heatmap(self.table(), value=value)

    def ensemble(self, how: Literal["intersect", "average"] | None = None) -> Any:
        """What several target prompts say of each state, put together, as a pandas DataFrame.

        Args:
            how: `intersect` or `average`; None is the Patchscope's `target.combine`.

        Raises:
            InputError: The run holds no next tokens.
        """
        from patchscope_nn.analysis.ensembles import combine

        chosen = how or self.manifest["recipe"]["target"]["combine"]
        return combine(self.table(), how=chosen)

    def summary(self, *, by_source: bool = False) -> Any:
        """The mean of each metric with its 95 % bootstrap interval over data rows, as a tidy DataFrame.

        Where the recipe has `best_over`, the best over these layers is taken first, for controls alike.

        Args:
            by_source: Average over the target layers too.

        Returns:
            A line for each metric, control (`patched` for the real cells), pair of layers and scale:
            `metric`, `control`, `source_layer`, `target_layer` (none where a control reads no layer, or where
            the best was taken over it), `scale` (only where there are several), `mean`, `low`, `high` (none
            where there is a single row), `n_rows`, `n_cells`.
        """
        from patchscope_nn.analysis.statistics import summarise

        return summarise(self.light_table(), metrics=self.metrics, best=self.best_over, by_source=by_source)

    def light_table(self) -> Any:
        """The cells as `table` gives them, without what was read of them: places, metrics and errors."""
        return light_frame(self.rows, self.manifest["columns"], metrics=self.metrics)

    @property
    def best_over(self) -> tuple[str, ...]:
        """What the summary and the figures take the best over."""
        return tuple(self.manifest["recipe"].get("best_over") or ())

    @property
    def metrics(self) -> list[str]:
        """The names of this run's metrics, those of its probe last."""
        asked = self.manifest["recipe"]
        named = [use if isinstance(use, str) else next(iter(use)) for use in asked["metrics"]]
        return named + (list(PROBE_METRICS) if asked.get("probe") else [])

    def report(self, path: str | Path | None = None) -> Path:
        """Write the HTML report.

        Args:
            path: The file; None writes `report.html` in the run's folder.

        Returns:
            The file.

        Raises:
            InputError: plotly is not installed, or the run has no folder and no path was given.
        """
        from patchscope_nn.report import write_report

        if path is None and self.path is None:
            raise InputError("this run has no folder.", hint="Give a path: run.report('report.html').")
        file = Path(path) if path is not None else Path(self.path or ".") / REPORT
        table, first_cells = self._tables()
        return write_report(table, manifest=self.manifest, path=file, first_cells=first_cells)

    def save_figures(
        self, folder: str | Path, *, formats: Sequence[str] = ("pdf", "svg", "png")
    ) -> list[Path]:
        """Write the report's figures for a paper, without a browser.

        Args:
            folder: The folder; it is made if need be.
            formats: Of `pdf`, `svg` and `png`.

        Returns:
            The files.

        Raises:
            InputError: plotly or matplotlib is not installed, or a format is none of these.
        """
        from patchscope_nn.report.figures import save_figures
        from patchscope_nn.report import run_figures

        return save_figures(run_figures(*self._tables(), manifest=self.manifest), folder, formats=formats)

    def _tables(self) -> tuple[Any, Any]:
        """The table of all cells, which may leave out what they say, and that of those a page shows."""
        from patchscope_nn.report import MAX_CELLS

        if len(self.rows) <= MAX_CELLS:
            return (table := self.table()), table
        return self.light_table(), frame(list(islice(self.rows, MAX_CELLS)), self.manifest["columns"])

    def _repr_html_(self) -> str:
        """The run as a notebook shows it."""
        from patchscope_nn.report import run_html

        where = "in memory" if self.path is None else str(self.path)
        return run_html(*self._tables(), manifest=self.manifest, where=where)


@checked
def load_run(path: str | Path) -> Run:
    """Read a run back from its folder, finished or not.

    Args:
        path: The folder.

    Returns:
        The run, with the cells that are done.

    Raises:
        FolderError: It is no run folder.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    lines = Lines(folder / LINES)
    said = _probed(folder, manifest["recipe"].get("probe"), n_cells=len(lines))
    return Run(manifest=manifest, rows=Widened(lines, said) if said else lines, path=folder)


def _probed(folder: Path, asked: Any, *, n_cells: int) -> Mapping[str, Sequence[Any]] | None:
    """What a folder holds of a probe; None where it is another's, or of fewer cells."""
    file = folder / PROBE
    if not asked or not file.exists():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    columns: Mapping[str, Sequence[Any]] = kept["columns"]
    fits = kept["probe"] == asked and all(len(values) == n_cells for values in columns.values())
    return columns if fits else None
