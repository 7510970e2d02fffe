"""Printing of comparisons: a table for each metric, or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscope_nn.analysis.statistics import REAL, mean_text
from patchscope_nn.cli.printing import existing, grid, how_to_report, out_json, show
from patchscope_nn.report.comparison import p_text

if TYPE_CHECKING:
    from patchscope_nn.analysis.comparison import Comparison
    from patchscope_nn.runs.experiments import Experiment


def print_experiment(experiment: Experiment, *, as_json: bool) -> None:
    """Print the comparison of a recipe's methods, and the paths of its folder and page."""
    folder, page = experiment.path, existing(experiment.path, "comparison.html")
    # Shards of methods are compared once they are merged.
    comparison = None if experiment.shard else experiment.compare()
    if as_json:
        runs = {
            name: {"folder": str(run.path), "hash": run.manifest["hash"], "cells": len(run.rows)}
            for name, run in experiment.items()
        }
        records = None if comparison is None else comparison.records()
        out_json({"folder": str(folder), "page": page, "methods": runs, "comparison": records})
        return
    n_cells = sum(len(run.rows) for run in experiment.values())
    cells = f"{n_cells} cells of {len(experiment)} methods"
    if comparison is None:
        show(f"shard {experiment.shard}: {cells} in {folder}; `patchscope merge` joins the shards")
        return
    print_comparison(comparison, title=experiment.title)
    show("", f"{cells} in {folder}")
    show(f"page: {page}" if page else f"no page: {how_to_report(folder)}")


def print_comparison(comparison: Comparison, *, title: str) -> None:
    """Print a table per metric: the means of each run and its controls, and differences to the first run."""
    over = dict.fromkeys(axis for name in comparison.names for axis in comparison.best[name])
    best = f"best over {' and '.join(over).replace('_', ' ')}, " if over else ""
    n_rows = int(comparison.means["n_rows"].max())
    show(
        title,
        f"{best}mean over all cells, with 95 % intervals over {n_rows} data rows;",
        f"differences are to {comparison.names[0]}; p: sign-flip test over rows, and corrected t over layers",
    )
    for metric in comparison.metrics:
        show("", _metric_table(comparison, metric=metric))
    for metric in comparison.metrics:
        for line in comparison.patched(metric).to_dict("records"):
            first, second = line["first_unpaired"], line["second_unpaired"]
            if first or second:
                of_first, of_second = f"{first} cells of {line['first']}", f"{second} of {line['second']}"
                show(f"{metric}: {of_first} and {of_second} have no partner")


def _metric_table(comparison: Comparison, *, metric: str) -> Any:
    means = comparison.means[comparison.means["metric"] == metric]
    controls = sorted(set(means["control"]) - {REAL})
    differences = {line["second"]: line for line in comparison.patched(metric).to_dict("records")}
    table = grid(metric, "mean", *controls, "difference", "p", "layers", "pairs")
    for name in dict.fromkeys(means["run"]):
        own = means[means["run"] == name].set_index("control").to_dict("index")
        real, *others = (mean_text(own.get(control), ".2f") for control in (REAL, *controls))
        others = [text.replace(" [", "\n[") for text in others]
        table.add_row(name, real, *others, *_difference(differences.get(name)))
    return table


def _difference(line: Mapping[str, Any] | None) -> list[str]:
    if line is None:
        return ["", "", "", ""]
    return [mean_text(line, "+.2f"), p_text(line["p"]), p_text(line["p_bonferroni"]), str(line["n_pairs"])]


def print_compared(comparison: Comparison, *, page: Path | None, title: str, as_json: bool) -> None:
    """Print a comparison of runs, and the path of its page."""
    if as_json:
        out_json({"page": None if page is None else str(page), **comparison.records()})
        return
    print_comparison(comparison, title=title)
    if page is not None:
        show("", f"page: {page}")
