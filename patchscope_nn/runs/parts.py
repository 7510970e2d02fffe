"""The parts of a run folder: Arrow files of finished cells, which are never changed once they are written.

A part holds the number that a cell had in the sweep when it was written, and its key. If the run has grown
since then, `numbers.arrow` holds the present numbers and data rows of all cells in the parts before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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

#: The parts of a folder, by the number of their file.
Parts = dict[int, pa.Table]


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


def read_part(file: Path, *, hint: str = "Delete it; its cells run again.") -> pa.Table:
    """Read an Arrow file; a large one is mapped into memory.

    Args:
        file: The file.
        hint: What to do if it is damaged.

    Raises:
        FolderError: It is damaged.
    """
    # A small file is read, because a mapped one stays open.
    source = pa.memory_map(str(file)) if file.stat().st_size > _MAPPED else pa.BufferReader(file.read_bytes())
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise FolderError(f"{file} is damaged: {str(error).splitlines()[0]}", hint=hint) from error


def write_part(file: Path, part: pa.Table) -> None:
    """Write an Arrow file, completely or not at all."""
    with replacing(file) as draft, pa.ipc.new_file(draft, part.schema) as writer:
        writer.write_table(part)


def renumbered(part: pa.Table, cells: Ints, rows: Ints) -> pa.Table:
    """Return a part whose cells have these numbers (-1 for none) and data rows; nothing is copied."""
    for name, values in ((CELL, cells), (_ROW, rows)):
        part = part.set_column(part.column_names.index(name), name, pa.array(values, pa.int64()))
    return part


def write_numbers(folder: Path, parts: Mapping[int, pa.Table]) -> None:
    """Keep the present numbers and data rows of the cells of all parts."""
    none = np.empty(0, np.int64)
    columns = {
        "part": [np.full(len(part), number) for number, part in parts.items()],
        **{name: [part[name].to_numpy() for part in parts.values()] for name in (CELL, _ROW)},
    }
    table = pa.table({name: np.concatenate([none, *arrays]) for name, arrays in columns.items()})
    write_part(folder / NUMBERS, table)
