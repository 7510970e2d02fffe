"""The finished cells of a run's folder, as they are written while it runs."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa


def contents(folder):
    """The bytes of each part, by name."""
    return {file.name: file.read_bytes() for file in sorted((Path(folder) / "cells").glob("*.arrow"))}


def cells(folder):
    """The numbers of the finished cells, in the order in which they were written."""
    tables = (pa.ipc.open_file(pa.BufferReader(part)).read_all() for part in contents(folder).values())
    return [number for table in tables for number in table["cell"].to_pylist()]
