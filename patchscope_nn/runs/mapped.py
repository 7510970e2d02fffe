"""The parts of a run's table in its folder: Arrow files, mapped into memory only while they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from patchscope_nn.errors import FolderError

#: Files of more bytes are mapped; smaller ones are read at once.
_MAPPED = 2**20


class MappedPart:
    """A part in a file, with the methods of a `pa.Table`.

    Each of them maps the file anew. A map that stays holds in memory whatever was ever read of it, which
    after writing the table of a large run is all of it.
    """

    def __init__(self, file: Path) -> None:
        table = _opened(pa.memory_map(str(file)), file)
        self._file, self._length, self.schema = file, len(table), table.schema

    def __len__(self) -> int:
        return self._length

    @property
    def table(self) -> pa.Table:
        """The whole part; it is mapped as long as any of its columns is in use.

        Raises:
            FolderError: The file is gone.
        """
        try:
            source = pa.memory_map(str(self._file))
        except FileNotFoundError as error:
            raise FolderError(
                f"{self._file} is gone, and the cells in it.", hint="Restore the folder, or run it again."
            ) from error
        return _opened(source, self._file)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        return self.table[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not of a table; also before this object is complete
            raise AttributeError(name)
        return getattr(self.table, name)


#: A part in memory, or in a file.
Part: TypeAlias = pa.Table | MappedPart


def read_part(file: Path) -> Part:
    """Read a part, or map it if it is large.

    Raises:
        FolderError: It is damaged.
    """
    if file.stat().st_size > _MAPPED:
        return MappedPart(file)
    return _opened(pa.BufferReader(file.read_bytes()), file)


def _opened(source: Any, file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise FolderError(
            f"{file} is damaged: {str(error).splitlines()[0]}", hint="Delete it; its cells run again."
        ) from error
