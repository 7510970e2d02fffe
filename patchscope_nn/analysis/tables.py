"""Results as a tidy table: one row per cell, with the same column order in every run.

The control is null for patched cells. Layers and positions are resolved: layers are blocks counted from 0,
and -1 is the input of block 0. Positions count from the left, and are lists because several tokens may be
patched together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchscope_nn.analysis.cell_rows import CellRows
from patchscope_nn.metrics import ColumnUse, MetricUse
from patchscope_nn.spec import ColumnType, Readout, readout_kinds

PLACES = (
    *("row", "control", "source_prompt", "source_position", "source_token", "source_layer"),
    *("target_prompt", "target_position", "target_token", "target_layer"),
    *("source_model", "target_model", "mapping", "scale", "sample"),
)


def columns_of(readout: Readout, uses: Sequence[MetricUse], derived: Sequence[ColumnUse] = ()) -> list[str]:
    """Return the names of a run's columns, in order."""
    metrics = [use.name for use in uses if use.name not in readout.given]
    return [*PLACES, *readout.given, *(use.name for use in derived), *metrics, "error"]


def frame(rows: CellRows, names: Sequence[str]) -> Any:
    """Convert rows to a pandas DataFrame with the run's columns; layers are nullable integers.

    Equal lists among the places are one object.
    """
    import pandas as pd

    return _typed(pd.DataFrame(rows.shared(names), columns=list(names)))


def light_frame(rows: CellRows, names: Sequence[str], *, metrics: Sequence[str]) -> Any:
    """Convert rows to a DataFrame that keeps places, metrics and errors, and leaves the other columns empty.

    Equal texts and lists are one object, and an empty column takes a byte for each cell, so that a million
    cells take about 200 MB.
    """
    import pandas as pd

    kept = rows.shared([name for name in names if name in (*PLACES, "error") or name in metrics])
    # Without a dtype, pandas copies texts into one buffer.
    columns: dict[str, Any] = {
        name: pd.Series(values, dtype=getattr(values, "dtype", None), copy=False)
        for name, values in kept.items()
    }
    empty = pd.Categorical.from_codes(np.full(len(rows), -1, np.int8), categories=[])
    columns |= {name: empty for name in names if name not in kept}
    return _typed(pd.DataFrame(columns, columns=list(names), index=range(len(rows)), copy=False))


def _typed(table: Any) -> Any:
    for name in ("source_layer", "target_layer"):
        table[name] = table[name].astype("Int64")
    for name in ("control", "error"):
        table[name] = table[name].astype(object).where(table[name].notna(), None)
    return table


#: The types of columns that no readout has; a column without a type is a metric, and holds numbers.
_TYPES: dict[str, ColumnType] = {
    **dict.fromkeys(("row", "source_layer", "target_layer", "sample"), "integer"),
    **dict.fromkeys(("source_position", "target_position"), "integers"),
    **dict.fromkeys(("source_token", "target_token"), "texts"),
    **dict.fromkeys(("control", "source_prompt", "target_prompt", "source_model", "target_model"), "text"),
    **dict.fromkeys(("mapping", "error", "probe_choice"), "text"),
}


def arrow_schema(names: Sequence[str], kinds: Mapping[str, ColumnType]) -> Any:
    """Return the pyarrow schema of a run's columns, which all parts of a table share."""
    import pyarrow as pa

    types = {name: kind for readout in readout_kinds().values() for name, kind in readout.columns.items()}
    types |= {**_TYPES, **kinds}
    arrow = {
        "text": pa.string(),
        "number": pa.float64(),
        "integer": pa.int64(),
        "texts": pa.list_(pa.string()),
        "numbers": pa.list_(pa.float64()),
        "integers": pa.list_(pa.int64()),
        "states": pa.list_(pa.list_(pa.float32())),
    }
    return pa.schema([(name, arrow[types.get(name, "number")]) for name in names])


def write_parquet(
    rows: CellRows, names: Sequence[str], file: Path, *, kinds: Mapping[str, ColumnType] = {}
) -> None:
    """Write a table part by part, so that it is never in memory as a whole.

    `kinds` has the kind of each column computed by a user's function, as in `metrics.Column`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(names, kinds)
    with pq.ParquetWriter(file, schema) as writer:
        for part in rows.tables():
            columns = [
                part[field.name].cast(field.type)
                if field.name in part.column_names
                else pa.nulls(len(part), field.type)
                for field in schema
            ]
            writer.write_table(pa.table(columns, schema=schema))
