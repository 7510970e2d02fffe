"""python -m benchmarks.overhead: where the time of a run of 100,000 cells goes, on the builtin model.

W2 with more contexts, two metrics, into a folder: what the passes take, and what planning, lowering, tables
and metrics, writing, progress and the report take beside them.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import patchscope_nn as ps
from benchmarks.speed.made import Scale, make
from patchscope_nn.analysis.tables import Tabulator
from patchscope_nn.backends import steps
from patchscope_nn.engines.transformers import Transformers
from patchscope_nn.models import load
from patchscope_nn.models.builtin import NAME
from patchscope_nn.runs import execute
from patchscope_nn.runs.folder import RunFolder
from patchscope_nn.runs.results import Run

SPENT: Counter[str] = Counter()


def main() -> None:
    """Run once, and print each part's seconds and share."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=main.__doc__)
    parser.add_argument("--cells", type=int, default=100_000)
    cells = parser.parse_args().cells
    model = load(NAME)
    rows = -(-cells // model.info.n_layers)
    workload = make("W2", model, Scale(times=-(-rows // 200)))
    for owner, name, part in (
        (Transformers, "run", "passes"),
        (steps, "lower", "lowering a step"),
        (execute, "plan", "planning"),
        (Tabulator, "row", "metrics and table rows"),
        (RunFolder, "append", "writing cells"),
        (RunFolder, "finish", "the parquet file and manifest"),
        (Run, "report", "the report"),
    ):
        _count(owner, name, part)
    scope = ps.Patchscope(
        source=ps.Source(prompt="{text}", position=-1, layer="all"),
        target=ps.Target(prompt=list(workload.target), position=-1, layer="same"),
        readout=ps.NextToken(top_k=5, reference="source"),
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run = ps.run(
            scope,
            model=model,
            data=[{"text": text} for text in workload.texts[:rows]],
            metrics=["precision_at_1", "surprisal_nats"],
            out=Path(folder) / "run",
            progress=_counted(lambda _done, _of: None, "progress"),
        )
        elapsed = time.perf_counter() - started
    SPENT["the rest"] = elapsed - SPENT.total()
    print(f"{len(run.rows):,} cells, {elapsed:.1f} s")
    print("\n| part | s | share | us a cell |\n|---|---|---|---|")
    for part, seconds in SPENT.most_common():
        print(f"| {part} | {seconds:.2f} | {100 * seconds / elapsed:.2f} % | {1e6 * seconds / cells:.1f} |")


def _count(owner: Any, name: str, part: str) -> None:
    setattr(owner, name, _counted(getattr(owner, name), part))


def _counted(call: Callable[..., Any], part: str) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            SPENT[part] += time.perf_counter() - started

    return counted


if __name__ == "__main__":
    main()
