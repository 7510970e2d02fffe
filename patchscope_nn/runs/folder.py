"""Writing of run folders.

    manifest.json   the recipe, its hash, models, versions, seed, timings
    cells/          the finished cells, in parts that are written while running (Arrow files)
    numbers.arrow   the present numbers of finished cells, if the run has grown
    probe.json      the columns of a probe, if the recipe has one
    cells.parquet   the table, written at the end
    ensemble.csv    combined results of several target prompts, written at the end
    report.html     the report, written at the end

A run that has more rows, layers, positions or controls goes on with what is missing; `identity.py` says what
may not differ. A part is written completely or not at all. Parts are mapped into memory when they are read,
so even a run of a million cells needs little of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from patchscope_nn._util.files import replacing, write_whole
from patchscope_nn.analysis.cell_rows import CELL, KEY, CellRows
from patchscope_nn.analysis.tables import write_parquet
from patchscope_nn.errors import FolderError
from patchscope_nn.runs.identity import Identity, check_same, identity
from patchscope_nn.runs.manifest import MANIFEST, Manifest, grown_manifest, read_manifest, write_manifest
from patchscope_nn.runs.parts import (
    CELLS,
    NUMBERS,
    Part,
    read_part,
    read_parts,
    renumbered,
    write_numbers,
    write_part,
)
from patchscope_nn.runs.prepared import PreparedRun

TABLE, REPORT = "cells.parquet", "report.html"
ENSEMBLE = "ensemble.csv"
PROBE = "probe.json"
_LOCK = ".lock"


class InMemory:
    """The store of a run without a folder.

    Args:
        prepared: The run.

    Attributes:
        path: None.
        manifest: None, since there is no earlier session.
        done: True for each cell that is finished, and for each that belongs to another shard.
        n_done: How many are finished.
        n_cells: How many cells the run has.
    """

    path: Path | None = None
    manifest: Manifest | None = None

    def __init__(self, prepared: PreparedRun) -> None:
        own = prepared.cells
        self.n_cells, self.n_done = len(own), 0
        self.done = np.ones(len(prepared.sweep.cells), bool)
        self.done[own.start : own.stop] = False
        self._parts: list[Part] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: there is no lock to release."""

    def append(self, part: pa.Table) -> None:
        """Store finished cells: the columns of a run's table, and `CELL`."""
        self._add(part)

    def _add(self, part: Part) -> None:
        cells = part[CELL].to_numpy()
        cells = cells[cells >= 0]
        self._parts.append(part)
        self.done[cells] = True
        self.n_done += len(cells)

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

    Args:
        path: The folder.
        manifest: Its manifest.
        prepared: The run, of which the folder may already hold cells.

    Attributes:
        path: The folder.
        manifest: Its manifest, written by an earlier session or by this one.
        has_grown: True if an earlier session was of a run with other rows, layers, positions or controls.

    Raises:
        FolderError: The folder has finished cells that are not part of the run, or a part is damaged.
    """

    def __init__(self, path: Path, manifest: Manifest, prepared: PreparedRun) -> None:
        super().__init__(prepared)
        self.path: Path = path
        self.manifest: Manifest = manifest
        self.has_grown = False
        self._index = prepared.index
        written = read_parts(path)
        parts = {number: located(part, prepared) for number, part in written.items()}
        check_belongs(path, parts.values(), prepared)
        if (path / NUMBERS).exists() or any(parts[number] is not part for number, part in written.items()):
            write_numbers(path, parts)
        for part in parts.values():
            self._add(part)
        (path / CELLS).mkdir(exist_ok=True)
        self._next = 1 + max(parts, default=-1)

    def append(self, part: pa.Table) -> None:
        """Write finished cells at once, so that they are not lost if the process dies later."""
        if not len(part):
            return
        file = self.path / CELLS / f"{self._next:08d}.arrow"
        keys = self._index.keys[part[CELL].to_numpy()]
        write_part(file, part.append_column(KEY, pa.array(keys)))
        self._next += 1
        self._add(read_part(file))

    def probe_columns(self, probe: Any) -> Mapping[str, Sequence[Any]] | None:
        """Return the columns of an earlier session's probe; None if the probe or the cells have changed."""
        return kept_probe_columns(self.path, probe, self.manifest["hash"], n_cells=self.n_done)

    def keep_probe_columns(self, probe: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the columns that a probe adds."""
        write_probe_columns(self.path, probe, self.manifest["hash"], columns)

    def finish(self, rows: CellRows, manifest: Manifest) -> None:
        """Write the table and the manifest of a finished run; if it has grown, remove an earlier report."""
        write_finished(self.path, rows, manifest)
        if self.has_grown:
            (self.path / REPORT).unlink(missing_ok=True)


def write_finished(path: Path, rows: CellRows, manifest: Manifest) -> None:
    """Write the table and the manifest of a finished run."""
    with replacing(path / TABLE) as draft:
        write_parquet(rows, manifest["columns"], draft, kinds=manifest["derived"])
    write_manifest(path, manifest)


def write_probe_columns(path: Path, probe: Any, digest: str, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write the columns that a probe adds to a run; `digest` is the run's hash."""
    kept = {"probe": probe, "hash": digest, "columns": columns}
    write_whole(path / PROBE, json.dumps(kept) + "\n")


@contextmanager
def open_folder(path: Path, manifest: Manifest, prepared: PreparedRun) -> Iterator[RunFolder]:
    """Create or continue a run's folder, and lock it against other processes.

    Args:
        path: The folder.
        manifest: The manifest of the run.
        prepared: The run.

    Yields:
        The folder, with the finished cells.

    Raises:
        FolderError: The folder's cells may not be mixed with the run's, or are not part of it; or the folder
            has other files, or is in use by another process.
    """
    import filelock

    manifest = manifest | {"identity": identity(prepared)}
    _check_owner(path, manifest["identity"])
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
        earlier = read_manifest(path) if (path / MANIFEST).exists() else None
        if earlier is not None:
            manifest = grown_manifest(manifest, earlier)
        folder = RunFolder(path, manifest, prepared)
        if manifest is not earlier:
            write_manifest(path, manifest)
            folder.has_grown = earlier is not None
        yield folder


def _check_owner(path: Path, own: Identity) -> None:
    if path.exists() and not path.is_dir():
        raise FolderError(f"{path} is a file.", hint="Give a folder as --out.")
    if (path / MANIFEST).exists():
        check_same(path, read_manifest(path), own, hint="Give another --out.")
    elif path.exists() and any(entry.name != _LOCK for entry in path.iterdir()):
        raise FolderError(f"{path} is not empty and is not the folder of a run.", hint="Give another --out.")


def located(part: Part, prepared: PreparedRun) -> Part:
    """Return a part with the numbers and data rows that its cells have in a run, or in a shard of it.

    They are -1 for cells that do not belong to it. If nothing changes, it is the same table.
    """
    cells, own = prepared.index.find(part[KEY].to_numpy()), prepared.cells
    cells = np.where((cells >= own.start) & (cells < own.stop), cells, -1)
    rows = np.where(cells < 0, -1, prepared.index.rows(cells))
    same = np.array_equal(cells, part[CELL].to_numpy()) and np.array_equal(rows, part["row"].to_numpy())
    return part if same else renumbered(part, cells, rows)


def check_belongs(path: Path, parts: Iterable[Part], prepared: PreparedRun) -> None:
    """Check that a folder's finished cells are part of the run that goes on in it.

    Cells of `shuffled` may be missing from it, because more data rows bring other partners.

    Raises:
        FolderError: Other cells are missing from the run.
    """
    n_lost = 0
    for part in parts:
        lost = part["control"].filter(pa.array(part[CELL].to_numpy() < 0))
        n_lost += len(lost)
        if "shuffled" in prepared.sweep.cells.controls:
            n_lost -= sum(value == "shuffled" for value in lost.to_pylist())
    if n_lost:
        raise FolderError(
            f"{path} has {n_lost} finished cells that are not part of this run, for example because it has "
            "other data rows, fewer rows, layers or positions, no such control, or another shard.",
            hint=f"Give another --out; with --reuse {path}, the cells that both runs have are taken from it.",
        )


def kept_probe_columns(
    folder: Path, probe: Any, digest: str, *, n_cells: int
) -> Mapping[str, Sequence[Any]] | None:
    """Read a probe's columns from a run folder; None if they are of another probe or of other cells."""
    file = folder / PROBE
    if not probe or not file.exists():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    columns: Mapping[str, Sequence[Any]] = kept["columns"]
    fits = (kept["probe"], kept.get("hash")) == (probe, digest)
    return columns if fits and all(len(values) == n_cells for values in columns.values()) else None
