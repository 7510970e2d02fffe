"""Printing of a finished run: its means and its folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from patchscope_nn.analysis.statistics import mean_text
from patchscope_nn.cli.printing import existing, grid, how_to_report, out_json, show

if TYPE_CHECKING:
    from patchscope_nn.runs.results import Run


_MOST_ERRORS = 5


def print_run(run: Run, *, as_json: bool) -> None:
    """Print a run's means, its errors, and the paths of its folder and report."""
    report = existing(run.path, "report.html")
    errors = Counter(error for error in run.rows.column("error") if error is not None)
    reused = run.manifest["sessions"][-1].get("reused", {})
    if as_json:
        counts = {"cells": len(run.rows), "failed": sum(errors.values())}
        identity = {"hash": run.manifest["hash"], "elapsed_s": run.manifest["timings"]["elapsed_s"]}
        summary = json.loads(run.summary().to_json(orient="records")) if run.metrics else []
        identity |= {"shard": run.manifest.get("shard"), "reused": reused}
        out_json({"folder": str(run.path), "report": report, **counts, **identity, "summary": summary})
        return
    if run.metrics:
        show(*_summary(run))
    shard = f"shard {run.manifest['shard']}: " if "shard" in run.manifest else ""
    show("", f"{shard}{len(run.rows)} cells in {run.path}")
    for folder, n_cells in reused.items():
        show(f"{n_cells} of them are from {folder}")
    common = errors.most_common(_MOST_ERRORS)
    for error, count in common:
        show(f"{count} of them have no numbers and are left out of means: {error}")
    if len(errors) > len(common):
        others = errors.total() - sum(count for _, count in common)
        show(f"{others} of them have other errors; see the table.")
    show(f"report: {report}" if report else f"no report: {how_to_report(run.path)}")


def _summary(run: Run) -> Iterator[Any]:
    """Yield a table with a line for each scale and layer, and a line of text for controls without a layer.

    The table has the first metric with its controls, and the other metrics without (the report has all).
    """
    summary = json.loads(run.summary(by_source=True).to_json(orient="records"))
    axis = "target_layer" if "source_layer" in run.best_over else "source_layer"
    means = {((line.get("scale"), line[axis]), line["metric"], line["control"]): line for line in summary}
    no_place = (None, None)
    places = sorted({place for place, *_ in means} - {no_place}, key=_order) or [no_place]
    layered = {control for place, _, control in means if place in places} | {"patched"}
    controls = sorted(layered, key=lambda control: (control != "patched", control))
    columns = [(run.metrics[0], control) for control in controls]
    columns += [(metric, "patched") for metric in run.metrics[1:]]
    headers = [f"{metric if control == 'patched' else ''}\n{control}" for metric, control in columns]
    best = f", best over {' and '.join(run.best_over).replace('_', ' ')}" if run.best_over else ""
    n_rows = max((entry["n_rows"] for entry in summary), default=0)
    over = f"mean over {n_rows} data rows with 95 % intervals{best}, by {axis.replace('_', ' ')}"
    title = f"{run.manifest['recipe']['title']}\n{over}\n"
    scaled = any(scale is not None for scale, _ in places)
    table = grid(*(["\nscale"] if scaled else []), "\nlayer", *headers, title=title)
    for scale, layer in places:
        name = {None: "all", -1: "embed"}.get(layer, str(layer))
        line = [means.get(((scale, layer), *column)) for column in columns]
        table.add_row(*([f"{scale:g}"] if scaled else []), name, *(mean_text(mean, ".2f") for mean in line))
    yield table
    first = [line for line in summary if line["metric"] == run.metrics[0]]
    flat = [f"{line['control']} {mean_text(line, '.2f')}" for line in first if line["control"] not in layered]
    if flat:
        yield f"\n{run.metrics[0]} without a state: {', '.join(flat)}"


def _order(place: tuple[Any, ...]) -> tuple[float, ...]:
    return tuple(float("-inf") if value is None else value for value in place)
