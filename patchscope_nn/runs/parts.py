"""The parts of a run folder: Arrow files of finished cells, which are never changed once they are written.

Large ones are mapped into memory, only while they are read. A part holds the number that a cell had in the
sweep when it was written, and its key. If the run has grown since then, `numbers.arrow` holds the present
numbers and data rows of all cells in the parts before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from patchscope_nn._util.files import replacing
from patchscope_nn._util.ragged import Ints
from patchscope_nn.analysis.cell_rows import CELL
from patchscope_nn.errors import FolderError

CELLS, NUMBERS = "cells", "numbers.arrow"
_ROW = "row"
#: Parts of more bytes are mapped into memory.
_MAPPED = 2**20
DAMAGED = "Delete it; its cells run again."


class MappedPart:
    """A part in a file. It has the methods of `pa.Table` that are used of parts.

    Each of them maps the file anew. A map that stays holds in memory whatever was ever read of it, which
    after writing the table of a large run is all of it.

    Args:
        file: The file.
        numbers: The present numbers and data rows of the cells; those in the file if it is empty.

    Raises:
        FolderError: The file is damaged.
    """

    def __init__(self, file: Path, numbers: Mapping[str, Ints] | None = None) -> None:
        self._file, self._numbers = file.absolute(), dict(numbers or {})
        table = self.table
        self._length, self.schema = len(table), table.schema

    def __len__(self) -> int:
        return self._length

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return list(self.schema.names)

    @property
    def table(self) -> pa.Table:
        """The whole part; it is mapped as long as any of its columns is in use.

        Raises:
            FolderError: The file is gone, or damaged.
        """
        try:
            source = pa.memory_map(str(self._file))
        except FileNotFoundError as error:
            raise FolderError(
                f"{self._file} is gone, and the cells in it.", hint="Restore the folder, or run it again."
            ) from error
        return _replaced(_opened(source, self._file), self._numbers)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        return self.table[name]

    def select(self, names: Sequence[str]) -> pa.Table:
        """Return some columns."""
        return self.table.select(names)

    def slice(self, offset: int = 0, length: int | None = None) -> pa.Table:
        """Return some rows."""
        return self.table.slice(offset, length)

    def take(self, places: pa.Array) -> pa.Table:
        """Return some rows, by their places."""
        return self.table.take(places)

    def renumbered(self, numbers: Mapping[str, Ints]) -> MappedPart:
        """Return the part with other numbers and data rows of its cells."""
        return MappedPart(self._file, numbers)


#: A part in memory, or in a file.
Part: TypeAlias = pa.Table | MappedPart
#: The parts of a folder, by the number of their file.
Parts: TypeAlias = dict[int, Part]


def read_parts(folder: Path) -> Parts:
    """Read the finished cells of a run's folder, with their present numbers and data rows.

    Raises:
        FolderError: A part is damaged, or the folder is of an older version.
    """
    if (folder / "cells.jsonl").exists() and not (folder / CELLS).is_dir():
        raise FolderError(
            f"{folder} was written by patchscope-nn 0.1, which kept cells in another form.",
            hint="Read its cells.parquet, or run it again with another --out.",
        )
    parts = {int(file.stem): read_part(file) for file in sorted((folder / CELLS).glob("*.arrow"))}
    if not (folder / NUMBERS).exists():
        return parts
    kept = read_part(folder / NUMBERS, hint="Delete it; the next run writes it again.")
    of_part, cells, rows = (kept[name].to_numpy() for name in ("part", CELL, _ROW))
    for number in np.unique(of_part).tolist():
        if number in parts:
            at = slice(*np.searchsorted(of_part, (number, number + 1)).tolist())
            parts[number] = renumbered(parts[number], cells[at], rows[at])
    return parts


def read_part(file: Path, *, hint: str = DAMAGED) -> Part:
    """Read an Arrow file, or map it if it is large.

    Args:
        file: The file.
        hint: What to do if it is damaged.

    Raises:
        FolderError: It is damaged.
    """
    if file.stat().st_size > _MAPPED:
        return MappedPart(file)
    return _opened(pa.BufferReader(file.read_bytes()), file, hint=hint)


def _opened(source: Any, file: Path, *, hint: str = DAMAGED) -> pa.Table:
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise FolderError(f"{file} is damaged: {str(error).splitlines()[0]}", hint=hint) from error


def write_part(file: Path, part: pa.Table) -> None:
    """Write an Arrow file, completely or not at all."""
    with replacing(file) as draft, pa.ipc.new_file(draft, part.schema) as writer:
        writer.write_table(part)


def renumbered(part: Part, cells: Ints, rows: Ints) -> Part:
    """Return a part whose cells have these numbers (-1 for none) and data rows; nothing is copied."""
    numbers = {CELL: cells, _ROW: rows}
    return part.renumbered(numbers) if isinstance(part, MappedPart) else _replaced(part, numbers)


def _replaced(part: pa.Table, columns: Mapping[str, Ints]) -> pa.Table:
    for name, values in columns.items():
        part = part.set_column(part.column_names.index(name), name, pa.array(values, pa.int64()))
    return part


def write_numbers(folder: Path, parts: Mapping[int, Part]) -> None:
    """Keep the present numbers and data rows of the cells of all parts."""
    none = np.empty(0, np.int64)
    columns = {
        "part": [np.full(len(part), number) for number, part in parts.items()],
        **{name: [part[name].to_numpy() for part in parts.values()] for name in (CELL, _ROW)},
    }
    table = pa.table({name: np.concatenate([none, *arrays]) for name, arrays in columns.items()})
    write_part(folder / NUMBERS, table)
