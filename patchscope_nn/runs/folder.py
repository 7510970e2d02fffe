"""The folder that one execution leaves, while it is written.

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

    def probe_columns(self, probe: Any) -> Mapping[str, Sequence[Any]] | None:  # noqa: ARG002 (none is kept)
        """The columns of an earlier session's probe; None, since none is kept."""
        return None

    def keep_probe_columns(self, probe: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Nothing is kept."""

    def finish(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest) -> None:
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
        append_lines(self.path / LINES, b"".join(lines.values()))
        for number, line in lines.items():
            self._lines.add(number, len(line))
        self.done.update(rows)

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of the finished cells, read from the folder when they are asked for."""
        return self._lines

    def probe_columns(self, probe: Any) -> Mapping[str, Sequence[Any]] | None:
        """The columns of an earlier session's probe; None where it was another, or of other cells."""
        return kept_probe_columns(self.path, probe, n_cells=len(self._lines))

    def keep_probe_columns(self, probe: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the columns that a probe adds."""
        write_whole(self.path / PROBE, json.dumps({"probe": probe, "columns": columns}) + "\n")

    def finish(self, rows: Sequence[Mapping[str, Any]], manifest: Manifest) -> None:
        """Write the table and the manifest of a run that is done."""
        with replacing(self.path / TABLE) as draft:
            write_parquet(rows, manifest["columns"], draft, kinds=manifest["derived"])
        write_manifest(self.path, manifest)


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
        cut_half_line(path / LINES)
        lines = Lines(path / LINES)
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


def kept_probe_columns(folder: Path, probe: Any, *, n_cells: int) -> Mapping[str, Sequence[Any]] | None:
    """The columns that a run folder keeps of a probe; None where they are another's, or of fewer cells."""
    file = folder / PROBE
    if not probe or not file.exists():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    columns: Mapping[str, Sequence[Any]] = kept["columns"]
    fits = kept["probe"] == probe and all(len(values) == n_cells for values in columns.values())
    return columns if fits else None
