"""The page that shows runs side by side: curves, paired differences, and their cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from patchscope_nn.analysis.comparison import Comparison
from patchscope_nn.analysis.statistics import REAL, is_null
from patchscope_nn.metrics import described
from patchscope_nn.report.cells import cells_json, script_json
from patchscope_nn.report.figures import metric_columns, visible
from patchscope_nn.report.figures.comparison import comparison_curve
from patchscope_nn.report.page import MAX_CELLS, plotly_js, template, write_whole
from patchscope_nn.report.summary import as_mapping, controls_said

if TYPE_CHECKING:
    from collections.abc import Hashable

_SURE = 0.05


@dataclass(frozen=True, kw_only=True)
class Side:
    """One run of the page.

    Attributes:
        name: What the page calls it.
        manifest: Its manifest.
        metrics: The names of its metric columns.
        shown: The table of its first cells.
        n_cells: How many it has.
    """

    name: str
    manifest: Mapping[str, Any]
    metrics: tuple[str, ...]
    shown: pd.DataFrame
    n_cells: int


def write_comparison(comparison: Comparison, sides: Sequence[Side], *, path: Path, title: str) -> Path:
    """Write the page; a reader of `path` sees the old file or the whole new one.

    Args:
        comparison: What comparing the runs said.
        sides: The runs.
        path: The file to write. Its folder is made if need be.
        title: The page's title.

    Returns:
        `path`.

    Raises:
        InputError: Plotly is not installed.
    """
    names = comparison.names
    known = {name: info for side in sides for name, info in described(side.manifest).items()}
    drawn = [
        comparison_curve(comparison.layers, metric=metric, names=names, known=known)
        for metric in comparison.metrics
    ]
    cells = _side_by_side(sides)
    recipes = {one.name: as_mapping(one.manifest.get("recipe")) for one in sides}
    page = template("comparison.html.jinja").render(
        title=visible(title),
        summary=list(_sentences(comparison)),
        facts=[(visible(one.name), visible(_fact(one))) for one in sides],
        titles=[_heading(one, comparison) for one in comparison.metrics],
        plotly=plotly_js(),
        figures=script_json([json.loads(figure.to_json()) for figure in drawn]),
        cells=cells_json(cells, metrics=metric_columns(cells, declared=_all_metrics(sides))),
        n_cells=sum(one.n_cells for one in sides),
        max_cells=MAX_CELLS,
        tables=[metric_table(comparison, metric=one) for one in comparison.metrics],
        own=list(_own(comparison)),
        first=visible(names[0]),
        cards=[],
        controls=controls_said(cells),
        command="",
        recipe=visible(json.dumps(recipes, indent=2, ensure_ascii=False, default=str), keep="\n"),
        manifest="",
    )
    return write_whole(page, path)


def _side_by_side(sides: Sequence[Side]) -> pd.DataFrame:
    """The cells of all runs, those of one row, control and layer beside one another."""
    cells = pd.concat([one.shown.assign(run=one.name, _side=place) for place, one in enumerate(sides)])
    kinds = [REAL, *sorted({str(one) for one in cells["control"] if not is_null(one)})]
    cells["_kind"] = [0 if is_null(one) else kinds.index(str(one)) for one in cells["control"]]
    order = ["row", "_kind", "source_layer", "target_layer", "_side"]
    return cells.sort_values(order, kind="stable", ignore_index=True).drop(columns=["_kind", "_side"])


def _all_metrics(sides: Sequence[Side]) -> list[str]:
    return list(dict.fromkeys(name for one in sides for name in one.metrics))


def _heading(metric: str, comparison: Comparison) -> str:
    over = {over for name in comparison.names for over in comparison.best[name]}
    best = f", best over {' and '.join(sorted(over)).replace('_', ' ')}" if over else ""
    lined = comparison.layers["source_layer"].notna().any() or comparison.layers["target_layer"].notna().any()
    return f"{metric}{best}: mean with 95 % interval over data rows{'; controls dashed' if lined else ''}"


def _fact(side: Side) -> str:
    models = as_mapping(side.manifest.get("models"))
    named = [as_mapping(models.get(end)).get("name") for end in ("source", "target")]
    said = [" -> ".join(dict.fromkeys(str(name) for name in named if name)), f"{side.n_cells:,} cells"]
    said += [str(as_mapping(side.manifest.get("recipe")).get("name", ""))]
    return ", ".join(part for part in said if part)


def _sentences(comparison: Comparison) -> Iterator[str]:
    """What came out, in plain sentences: each run beside the first, in the first metric."""
    found = comparison.between()
    metric = comparison.metrics[0]
    for line in found[(found["metric"] == metric) & (found["first_control"] == REAL)].to_dict("records"):
        sure = "" if pd.isna(line["p"]) else f", {p_text(line['p'])} by sign flips over data rows"
        low, high = line["low"], line["high"]
        spread = "" if pd.isna(low) else f" (95 % interval {low:+.3g} to {high:+.3g}{sure})"
        yield (
            f"Over {line['n_pairs']:,} pairs of cells of {line['n_rows']:,} data rows, mean {metric} of"
            f" {visible(line['second'])} differs from that of {visible(line['first'])} by"
            f" {line['mean']:+.3g}{spread}."
        )
    unpaired = int(found["first_unpaired"].sum() + found["second_unpaired"].sum())
    if unpaired:
        yield f"Some cells have no partner in the other run ({unpaired:,} in all); the tables say where."


def p_text(p: float) -> str:
    """A p value, never as zero: `p = 0.03`, or `p < .001`."""
    return "p < .001" if p < 0.001 else f"p = {p:.2g}"  # noqa: PLR2004 (as p values are written)


def _number(mean: Any, low: Any, high: Any, *, sign: str = "") -> str:
    if pd.isna(mean):
        return ""
    spread = "" if pd.isna(low) else f" [{low:{sign}.3g}, {high:{sign}.3g}]"
    return f"{mean:{sign}.3g}{spread}"


def metric_table(comparison: Comparison, *, metric: str) -> dict[str, Any]:
    """One metric's table: each run's means, and its difference to the first."""
    means = comparison.means[comparison.means["metric"] == metric]
    controls = sorted(set(means["control"]) - {REAL})
    between = comparison.between()
    between = between[(between["metric"] == metric) & (between["first_control"] == REAL)].set_index("second")
    lines = []
    for name in dict.fromkeys(means["run"]):
        own = means[means["run"] == name].set_index("control")
        cells = [
            _number(*own.loc[control, ["mean", "low", "high"]]) if control in own.index else ""
            for control in (REAL, *controls)
        ]
        lines.append([visible(name), *cells, *_columns(between, name)])
    heads = ["run", "patched", *(f"{control} (control)" for control in controls)]
    heads += ["difference to the first", "p", "p of layers, corrected", "pairs", "without a partner"]
    return {"name": metric, "heads": list(map(visible, heads)), "lines": lines}


def _columns(between: pd.DataFrame, name: Hashable) -> list[str]:
    if name not in between.index:
        return ["", "", "", "", ""]
    line = between.loc[name]
    unpaired = int(line["first_unpaired"]), int(line["second_unpaired"])
    return [
        _number(line["mean"], line["low"], line["high"], sign="+"),
        *(
            "" if pd.isna(line[name]) else p_text(line[name]).removeprefix("p ").removeprefix("= ")
            for name in ("p", "p_bonferroni")
        ),
        f"{int(line['n_pairs']):,}",
        f"{unpaired[0]:,} of the first, {unpaired[1]:,} of its own" if any(unpaired) else "none",
    ]


def _own(comparison: Comparison) -> Iterator[list[str]]:
    """Each run's patched cells beside its own controls."""
    found = comparison.differences
    for line in found[found["first"] == found["second"]].to_dict("records"):
        if line["n_pairs"]:
            yield [
                line["metric"],
                visible(line["second"]),
                visible(line["first_control"]),
                _number(line["mean"], line["low"], line["high"], sign="+"),
                "" if pd.isna(line["p"]) else p_text(line["p"]).removeprefix("p ").removeprefix("= "),
                f"{line['n_pairs']:,}",
            ]
