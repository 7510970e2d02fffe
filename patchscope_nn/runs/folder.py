"""Writing of run folders.

    manifest.json   the recipe, its hash, models, versions, seed, timings
    cells/          the finished cells, in parts that are written while running (Arrow files)
    probe.json      the columns of a probe, if the recipe has one
    cells.parquet   the table, written at the end
    ensemble.csv    combined results of several target prompts, written at the end
    report.html     the report, written at the end

A folder belongs to one hash, so another recipe never continues it. A part is written completely or not at
all. Parts are mapped into memory when they are read, so even a run of a million cells needs little of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from patchscope_nn._util.files import replacing, write_whole
from patchscope_nn.analysis.cell_rows import CELL, CellRows
from patchscope_nn.analysis.tables import write_parquet
from patchscope_nn.errors import FolderError
from patchscope_nn.runs.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from patchscope_nn.runs.mapped import Part, read_part

CELLS, TABLE, REPORT = "cells", "cells.parquet", "report.html"
ENSEMBLE = "ensemble.csv"
PROBE = "probe.json"
_LOCK = ".lock"


class InMemory:
    """The store of a run without a folder.

    Attributes:
        path: None.
        manifest: None, since there is no earlier session.
        done: True for each cell that is finished.
        n_done: How many are.
    """

    path: Path | None = None
    manifest: Manifest | None = None

    def __init__(self, n_cells: int) -> None:
        self.done, self.n_done = np.zeros(n_cells, bool), 0
        self._parts: list[Part] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: there is no lock to release."""

    def append(self, part: pa.Table) -> None:
        """Store finished cells: the columns of a run's table, and `CELL`."""
        self._add(part)

    def _add(self, part: Part) -> None:
        self._parts.append(part)
        self.done[part[CELL].to_numpy()] = True
        self.n_done += len(part)

    def rows(self) -> CellRows:
        """Return the rows of the finished cells, in the order of the sweep."""
        return CellRows(self._parts)

    def probe_columns(self, probe: Any) -> Mapping[str, Sequence[Any]] | None:  # noqa: ARG002 (none is kept)
        """Return the columns of an earlier session's probe: always None."""
        return None

    def keep_probe_columns(self, probe: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Do nothing: a later session cannot use them."""

    def finish(self, rows: CellRows, manifest: Manifest) -> None:
        """Do nothing: there are no files to write."""


class RunFolder(InMemory):
    """A run folder that is being written, by one process at a time.

    Attributes:
        path: The folder.
        manifest: The manifest written by an earlier session, or by this one.
        done: The numbers of the cells finished so far.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(manifest["n_cells"])
        self.path: Path = path
        self.manifest: Manifest = manifest
        for part in read_parts(path):
            self._add(part)
        (path / CELLS).mkdir(exist_ok=True)
        written = (int(file.stem) for file in (path / CELLS).glob("*.arrow"))
        self._next = 1 + max(written, default=-1)

    def append(self, part: pa.Table) -> None:
        """Write finished cells at once, so that they are not lost if the process dies later."""
        if not len(part):
            return
        file = self.path / CELLS / f"{self._next:08d}.arrow"
        with replacing(file) as draft, pa.ipc.new_file(draft, part.schema) as writer:
            writer.write_table(part)
        self._next += 1
        self._add(read_part(file))

    def probe_columns(self, probe: Any) -> Mapping[str, Sequence[Any]] | None:
        """Return the columns of an earlier session's probe; None if the probe or the cells have changed."""
        return kept_probe_columns(self.path, probe, n_cells=self.n_done)

    def keep_probe_columns(self, probe: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the columns that a probe adds."""
        write_whole(self.path / PROBE, json.dumps({"probe": probe, "columns": columns}) + "\n")

    def finish(self, rows: CellRows, manifest: Manifest) -> None:
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
        if (path / MANIFEST).exists():
            manifest = read_manifest(path)
        else:
            write_manifest(path, manifest)
        yield RunFolder(path, manifest)


def read_parts(folder: Path) -> list[Part]:
    """Read the finished cells of a run's folder.

    Raises:
        FolderError: A part is damaged, or the folder is of an older version.
    """
    if (folder / "cells.jsonl").exists() and not (folder / CELLS).is_dir():
        raise FolderError(
            f"{folder} was written by patchscope-nn 0.1, which kept cells in another form.",
            hint="Read its cells.parquet, or run it again with another --out.",
        )
    return [read_part(file) for file in sorted((folder / CELLS).glob("*.arrow"))]


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
