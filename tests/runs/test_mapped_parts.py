"""Large parts of a run's table are mapped only while they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from patchscope_nn.analysis.cell_rows import CELL, CellRows
from patchscope_nn.errors import FolderError
from patchscope_nn.runs.parts import MappedPart, read_part

N_CELLS = 100_000  # more than a megabyte


def table(first: int = 0) -> pa.Table:
    numbers = np.arange(first, first + N_CELLS)
    texts = pa.array([f"text {number % 7}" for number in numbers]).dictionary_encode()
    lists = pa.array([[int(number), 1] for number in numbers])
    return pa.table({CELL: numbers, "row": numbers // 3, "source_prompt": texts, "top_ids": lists})


def written(folder: Path, part: pa.Table, name: str) -> Path:
    file = folder / f"{name}.arrow"
    with pa.ipc.new_file(file, part.schema) as writer:
        writer.write_table(part)
    return file


def is_mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read from Linux's /proc")
def test_a_large_part_reads_like_a_table_and_does_not_stay_mapped(tmp_path):
    tables = [table(), table(N_CELLS)]
    files = [written(tmp_path, part, str(number)) for number, part in enumerate(tables)]
    parts = [read_part(file) for file in files]
    assert all(isinstance(part, MappedPart) for part in parts)
    mapped, kept = CellRows(parts), CellRows(tables)
    assert mapped[N_CELLS - 1 : N_CELLS + 1] == kept[N_CELLS - 1 : N_CELLS + 1]
    assert list(mapped.first(3)) == list(kept.first(3))
    names = ("row", "source_prompt", "top_ids", "missing")
    ours, theirs = mapped.shared(names), kept.shared(names)
    for name in names:
        assert list(mapped.column(name)) == list(kept.column(name)) == list(ours[name]) == list(theirs[name])
    for ours, theirs in zip(mapped.tables(), kept.tables(), strict=True):
        assert ours == theirs
    del ours
    assert not any(map(is_mapped, files))
    column = parts[0]["top_ids"]
    assert is_mapped(files[0])  # as long as it is in use
    assert column[5].as_py() == [5, 1]


def test_a_part_that_is_damaged_or_gone_says_so(tmp_path):
    file = written(tmp_path, table(), "0")
    part = read_part(file)
    file.unlink()
    with pytest.raises(FolderError, match="is gone"):
        part["row"]
    file.write_bytes(b"no Arrow file" * 100_000)
    with pytest.raises(FolderError, match="is damaged"):
        read_part(file)
