"""The page that compares runs: curves, paired differences, and their cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from patchscope_nn.analysis.comparison import Comparison
from patchscope_nn.analysis.statistics import REAL, is_null, mean_text
from patchscope_nn.metrics import described
from patchscope_nn.report.cells import cells_json, script_json
from patchscope_nn.report.figures.comparison import comparison_curve
from patchscope_nn.report.figures.table import metric_columns
from patchscope_nn.report.figures.text import visible
from patchscope_nn.report.page import MAX_CELLS, plotly_js, template, write_whole
from patchscope_nn.report.summary import described_controls, section

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the runs on a comparison page.

    `first_cells` is the table of its first cells, with all columns; `n_cells` counts all its cells.
    """

    name: str
    manifest: Mapping[str, Any]
    metrics: tuple[str, ...]
    first_cells: pd.DataFrame
    n_cells: int


def write_comparison(comparison: Comparison, sides: Sequence[Side], *, path: Path, title: str) -> Path:
    """Write the page to `path` atomically, creating its folder if necessary.

    Raises:
        InputError: Plotly is not installed.
    """
    names, metrics = comparison.names, comparison.metrics
    known = {name: info for side in sides for name, info in described(side.manifest).items()}
    drawn = [comparison_curve(comparison.layers, metric=name, names=names, known=known) for name in metrics]
    cells = _side_by_side(sides)
    declared = list(dict.fromkeys(metric for side in sides for metric in side.metrics))
    recipes = {side.name: section(side.manifest, "recipe") for side in sides}
    page = template("comparison.html.jinja").render(
        title=visible(title),
        summary=list(_sentences(comparison)),
        facts=[(visible(side.name), visible(_fact(side))) for side in sides],
        titles=[_heading(metric, comparison) for metric in metrics],
        plotly=plotly_js(),
        figures=script_json([figure.plain() for figure in drawn]),
        cells=cells_json(cells, metrics=metric_columns(cells, declared=declared)),
        n_cells=sum(side.n_cells for side in sides),
        max_cells=MAX_CELLS,
        tables=[metric_table(comparison, metric=metric) for metric in metrics],
        own_controls=list(_own_controls(comparison)),
        first=visible(names[0]),
        cards=[],
        controls=described_controls(cells),
        command="",
        recipe=visible(json.dumps(recipes, indent=2, ensure_ascii=False, default=str), keep="\n"),
        manifest="",
    )
    return write_whole(page, path)


def _side_by_side(sides: Sequence[Side]) -> pd.DataFrame:
    """Return the cells of all runs, with cells of the same row, control and layer next to each other."""
    cells = pd.concat([side.first_cells.assign(run=side.name, _side=n) for n, side in enumerate(sides)])
    kinds = [REAL, *sorted({str(control) for control in cells["control"] if not is_null(control)})]
    cells["_kind"] = [0 if is_null(name) else kinds.index(str(name)) for name in cells["control"]]
    order = ["row", "_kind", "source_layer", "target_layer", "_side"]
    return cells.sort_values(order, kind="stable", ignore_index=True).drop(columns=["_kind", "_side"])


def _heading(metric: str, comparison: Comparison) -> str:
    over = {over for name in comparison.names for over in comparison.best[name]}
    best = f", best over {' and '.join(sorted(over)).replace('_', ' ')}" if over else ""
    lined = comparison.layers["source_layer"].notna().any() or comparison.layers["target_layer"].notna().any()
    return f"{metric}{best}: mean with 95 % interval over data rows{'; controls dashed' if lined else ''}"


def _fact(side: Side) -> str:
    names = [section(side.manifest, "models", end).get("name") for end in ("source", "target")]
    models = " -> ".join(dict.fromkeys(str(name) for name in names if name))
    recipe = str(section(side.manifest, "recipe").get("name", ""))
    return ", ".join(filter(None, (models, f"{side.n_cells:,} cells", recipe)))


def _sentences(comparison: Comparison) -> Iterator[str]:
    """Yield the differences between each run and the first, in the first metric, as sentences."""
    between, metric = comparison.between(), comparison.metrics[0]
    for line in comparison.patched(metric).to_dict("records"):
        low, high, p = line["low"], line["high"], p_text(line["p"], equals="= ")
        test = f"; p {p}, sign-flip test over data rows" if p else ""
        spread = "" if pd.isna(low) else f" (95 % interval {low:+.3g} to {high:+.3g}{test})"
        yield (
            f"Over {line['n_pairs']:,} pairs of cells from {line['n_rows']:,} data rows, the mean {metric} of"
            f" {visible(line['second'])} differs from that of {visible(line['first'])} by"
            f" {line['mean']:+.3g}{spread}."
        )
    unpaired = int(between["first_unpaired"].sum() + between["second_unpaired"].sum())
    if unpaired:
        yield f"{unpaired:,} cells have no partner in the other run; the tables show where they are."


def p_text(p: float, *, equals: str = "") -> str:
    """Write a p value as `0.03`, after `equals`, or as `< .001` if it is smaller; empty for NaN."""
    if pd.isna(p):
        return ""
    return "< .001" if p < 0.001 else f"{equals}{p:.2g}"  # noqa: PLR2004 (the usual notation)


def metric_table(comparison: Comparison, *, metric: str) -> dict[str, Any]:
    """Make the table of one metric: the means of each run and its difference from the first run."""
    means = comparison.means[comparison.means["metric"] == metric]
    controls = sorted(set(means["control"]) - {REAL})
    between = comparison.patched(metric).set_index("second")
    lines = []
    for name in dict.fromkeys(means["run"]):
        own = means[means["run"] == name].set_index("control").to_dict("index")
        cells = [mean_text(own.get(control)) for control in (REAL, *controls)]
        lines.append([visible(name), *cells, *_columns(between, name)])
    heads = ["run", "patched", *(f"{control} (control)" for control in controls)]
    heads += ["difference from the first", "p", "p over layers, corrected", "pairs", "without a partner"]
    return {"name": metric, "heads": list(map(visible, heads)), "lines": lines}


def _columns(between: pd.DataFrame, name: Hashable) -> list[str]:
    """Return the columns that compare a run with the first; they are empty for the first itself."""
    if name not in between.index:
        return ["", "", "", "", ""]
    line = between.loc[name]
    first, second = int(line["first_unpaired"]), int(line["second_unpaired"])
    return [
        mean_text(line, "+.3g"),
        p_text(line["p"]),
        p_text(line["p_bonferroni"]),
        f"{int(line['n_pairs']):,}",
        f"{first:,} of the first, {second:,} of this run" if first or second else "none",
    ]


def _own_controls(comparison: Comparison) -> Iterator[list[str]]:
    """Yield the difference of each run's patched cells from each of its own controls."""
    differences = comparison.differences
    for line in differences[differences["first"] == differences["second"]].to_dict("records"):
        if line["n_pairs"]:
            names = line["metric"], visible(line["second"]), visible(line["first_control"])
            yield [*names, mean_text(line, "+.3g"), p_text(line["p"]), f"{line['n_pairs']:,}"]
