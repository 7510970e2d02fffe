"""Runs: the folder one execution leaves, and what is read back from it.

    manifest.json   what ran: the recipe, its hash, models, versions, seed, timings
    cells.jsonl     one line for each finished cell, while running; kept afterwards
    cells.parquet   the table, at the end
    report.html     the report, at the end

A folder belongs to one hash: another recipe never continues it. A line that a killed process left half
written is cut off, and its cell is run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from patchscope_nn.errors import FolderError, InputError
from patchscope_nn.tables import frame

MANIFEST, LINES, TABLE, REPORT = "manifest.json", "cells.jsonl", "cells.parquet", "report.html"
_LOCK = ".lock"
Manifest = dict[str, Any]


class InMemory:
    """A store for a run that leaves no folder.

    Attributes:
        path: None.
        manifest: None; there is no earlier one.
        done: The rows of the cells finished so far, by key.
    """

    path: Path | None = None
    manifest: Manifest | None = None

    def __init__(self) -> None:
        self.done: dict[str, Mapping[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep finished cells: table rows by the key of their cell."""
        self.done.update(rows)

    def finish(self, run: Run) -> None:
        """Nothing more is to be written."""


class RunFolder(InMemory):
    """A run folder that is being written, by one process at a time.

    Attributes:
        path: The folder.
        manifest: What an earlier session wrote, or this one did.
        done: The rows of the cells finished so far, by key.
    """

    def __init__(self, path: Path, manifest: Manifest, done: dict[str, Mapping[str, Any]]) -> None:
        self.path: Path = path
        self.manifest: Manifest = manifest
        self.done = done

    def append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write finished cells, so that no later death of this process loses them."""
        text = "".join(
            json.dumps({"key": key, **row}, ensure_ascii=False) + "\n" for key, row in rows.items()
        )
        with (self.path / LINES).open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        super().append(rows)

    def finish(self, run: Run) -> None:
        """Write the table and the manifest of a run that is done."""
        partial = self.path / f".{TABLE}.partial"
        run.table().to_parquet(partial, index=False)
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
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FolderError(
            f"{path} is being written by another process.", hint="Wait for it, or give another --out."
        ) from None
    try:
        done, whole = _finished(path / LINES)
        if (path / LINES).exists():
            os.truncate(path / LINES, whole)
        if (path / MANIFEST).exists():
            manifest = read_manifest(path)
        else:
            write_manifest(path, manifest)
        yield RunFolder(path, manifest, done)
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


def _finished(file: Path) -> tuple[dict[str, Mapping[str, Any]], int]:
    """The cells of a file by key, and how many bytes their whole lines take."""
    done: dict[str, Mapping[str, Any]] = {}
    whole = 0
    if file.exists():
        with file.open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                done[row.pop("key")] = row
                whole += len(line)
    return done, whole


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


@dataclass(frozen=True, kw_only=True)
class Run:
    """One execution: what ran and what came out.

    Attributes:
        manifest: What ran, as `manifest.json` holds it.
        rows: One dict for each cell, in the order of the sweep.
        path: Its folder; None where it was kept in memory.
    """

    manifest: Manifest
    rows: tuple[Mapping[str, Any], ...]
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
        from patchscope_nn.plots import text_heatmap

        return text_heatmap(self.table(), value=value)

    def summary(self) -> Any:
        """The mean of each metric by layer and control, as a pandas DataFrame."""
        return summarise(self.table(), self.metrics)

    @property
    def metrics(self) -> list[str]:
        """The names of this run's metrics."""
        return [
            use if isinstance(use, str) else next(iter(use)) for use in self.manifest["recipe"]["metrics"]
        ]

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
        return write_report(self.table(), manifest=self.manifest, path=file)


def summarise(table: Any, metrics: Sequence[str]) -> Any:
    """The mean of each metric by layer and control.

    Args:
        table: A run's table.
        metrics: Names of metric columns.

    Returns:
        A DataFrame with columns `source_layer`, `control` (`patched` for the real cells), `n`, and one mean
        for each metric; an unpatched run has no layer.
    """
    named = table.assign(control=[control or "patched" for control in table["control"]])
    groups = named.groupby(["control", "source_layer"], dropna=False, sort=True)
    means = groups[list(metrics)].mean().reset_index()
    return means.assign(n=groups.size().to_numpy())[["source_layer", "control", "n", *metrics]]


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
    done, _ = _finished(folder / LINES)
    return Run(manifest=manifest, rows=tuple(done.values()), path=folder)
