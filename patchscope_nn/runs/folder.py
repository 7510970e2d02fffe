"""Writing of run folders.

    manifest.json   the recipe, its hash, models, versions, seed, timings
    cells.jsonl     a line for each finished cell, written while running
    probe.json      the columns of a probe, if the recipe has one
    cells.parquet   the table, written at the end
    ensemble.csv    combined results of several target prompts, written at the end
    report.html     the report, written at the end

A folder belongs to one hash, so another recipe never continues it. If a process was killed while it wrote a
line, the incomplete line is removed and its cell runs again. Cells are read from the file on access, so even
a run of a hundred thousand cells needs little memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from patchscope_nn._util.files import append_lines, cut_half_line, replacing, write_whole
from patchscope_nn.analysis.tables import write_parquet
from patchscope_nn.errors import FolderError
from patchscope_nn.runs.lazy_rows import Lines
from patchscope_nn.runs.manifest import MANIFEST, Manifest, read_manifest, write_manifest

LINES, TABLE, REPORT = "cells.jsonl", "cells.parquet", "report.html"
ENSEMBLE = "ensemble.csv"
PROBE = "probe.json"
_LOCK = ".lock"


class InMemory:
    """The store of a run without a folder.

    Attributes:
        path: None.
        manifest: None, since there is no earlier session.
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
        """Do nothing: there is no lock to release."""

    def append(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Store finished cells: table rows by cell number."""
        self._rows.update(rows)
        self.done.update(rows)

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Return the rows of the finished cells, in the order of the sweep."""
        return tuple(self._rows[number] for number in sorted(self._rows))

    def probe_columns(self, probe: Any) -> Mapping[str, Sequence[Any]] | None:  # noqa: ARG002 (none is kept)
        """Return the columns of an earlier session's probe: always None."""
        return None

    def keep_probe_columns(self, probe: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Do nothing: a later session cannot use them."""

    def finish(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest) -> None:
        """Do nothing: there are no files to write."""


class RunFolder(InMemory):
    """A run folder that is being written, by one process at a time.

    Attributes:
        path: The folder.
        manifest: The manifest written by an earlier session, or by this one.
        done: The numbers of the cells finished so far.
    """

    def __init__(self, path: Path, manifest: Manifest, lines: Lines) -> None:
        self.path: Path = path
        self.manifest: Manifest = manifest
        self.done = set(lines.numbers())
        self._lines = lines

    def append(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Write finished cells at once, so that they are not lost if the process dies later."""
        lines = {
            number: json.dumps({"cell": number, **row}, ensure_ascii=False).encode() + b"\n"
            for number, row in rows.items()
        }
        append_lines(self.path / LINES, b"".join(lines.values()))
        for number, line in lines.items():
            self._lines.add(number, len(line))
        self.done.update(rows)

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Return the rows of the finished cells, which are read from the folder on access."""
        return self._lines

    def probe_columns(self, probe: Any) -> Mapping[str, Sequence[Any]] | None:
        """Return the columns of an earlier session's probe; None if the probe or the cells have changed."""
        return kept_probe_columns(self.path, probe, n_cells=len(self._lines))

    def keep_probe_columns(self, probe: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the columns that a probe adds."""
        write_whole(self.path / PROBE, json.dumps({"probe": probe, "columns": columns}) + "\n")

    def finish(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest) -> None:
        """Write the table and the manifest of a finished run."""
        with replacing(self.path / TABLE) as draft:
            write_parquet(rows, manifest["columns"], draft, kinds=manifest["derived"])
        write_manifest(self.path, manifest)


@contextmanager
def open_folder(path: Path, manifest: Manifest) -> Iterator[RunFolder]:
    """Create or continue a run's folder, and lock it against other processes.

    Args:
        path: The folder.
        manifest: The manifest of the run; its `hash` identifies the run.

    Yields:
        The folder, with the finished cells.

    Raises:
        FolderError: The folder belongs to another run, has other files, or is in use by another process.
    """
    import filelock

    _check_owner(path, manifest["hash"])
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"{path} cannot be created: {error.strerror}.", hint="Give another --out."
        ) from error
    try:
        lock = filelock.FileLock(path / _LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise FolderError(
            f"{path} is being written by another process.", hint="Wait for it, or give another --out."
        ) from None
    with lock:
        cut_half_line(path / LINES)
        lines = Lines(path / LINES)
        if (path / MANIFEST).exists():
            manifest = read_manifest(path)
        else:
            write_manifest(path, manifest)
        yield RunFolder(path, manifest, lines)


def _check_owner(path: Path, digest: str) -> None:
    if path.exists() and not path.is_dir():
        raise FolderError(f"{path} is a file.", hint="Give a folder as --out.")
    if (path / MANIFEST).exists():
        existing = read_manifest(path).get("hash")
        if existing != digest:
            raise FolderError(
                f"{path} holds another run (hash {existing}, this run has {digest}).",
                hint="Give another --out, or use that run's recipe, options and model to continue it.",
            )
    elif path.exists() and any(entry.name != _LOCK for entry in path.iterdir()):
        raise FolderError(f"{path} is not empty and is not the folder of a run.", hint="Give another --out.")


def kept_probe_columns(folder: Path, probe: Any, *, n_cells: int) -> Mapping[str, Sequence[Any]] | None:
    """Read a probe's columns from a run folder; None if they are of another probe or of fewer cells."""
    file = folder / PROBE
    if not probe or not file.exists():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    columns: Mapping[str, Sequence[Any]] = kept["columns"]
    fits = kept["probe"] == probe and all(len(values) == n_cells for values in columns.values())
    return columns if fits else None
