"""Section 4.1: how early the state at a random token holds the next one, by token identity and logit lens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import patchscope_nn as ps
from benchmarks.quality.contexts import contexts
from benchmarks.quality.intervals import Interval, interval, intervals
from benchmarks.quality.models import short
from benchmarks.quality.write import draw_curves, markdown, write_csv, write_page
from patchscope_nn.models import Model

METHODS = {"token identity": "next-token", "logit lens": "logit-lens"}
CONTROLS = ("shuffled", "random")
METRICS = ("precision_at_1", "surprisal_nats")


class Curve(NamedTuple):
    """One method, or its control, on one model.

    Attributes:
        method: The method.
        control: The control; None where it is the method itself.
        metric: The metric.
        values: (n_rows, n_layers)
    """

    method: str
    control: str | None
    metric: str
    values: NDArray[np.float64]

    @property
    def name(self) -> str:
        """Its name in a legend."""
        return self.method if self.control is None else f"{self.method}, {self.control}"


def run(model: Model, *, texts: Path, count: int, work: Path, out: Path, command: str) -> None:
    """Run both methods with their controls on held-out contexts, and write what came out."""
    rows = contexts(texts, model=model, count=count)
    curves = [
        curve
        for method, recipe in METHODS.items()
        for curve in _curves(method, sweep(recipe, model, rows, work))
    ]
    layers = list(range(model.info.n_layers))
    spans = [intervals(curve.values) for curve in curves]
    write_csv(
        out / "next-token.csv",
        [
            {
                "model": model.info.name,
                "method": curve.method,
                "control": curve.control or "",
                "metric": curve.metric,
                "layer": layer,
                "n": len(rows),
                **span._asdict(),
            }
            for curve, part in zip(curves, spans, strict=True)
            for layer, span in zip(layers, part, strict=True)
        ],
    )
    shown = {
        curve.name: (layers, part)
        for curve, part in zip(curves, spans, strict=True)
        if curve.metric == "precision_at_1"
    }
    title = f"Next token at a random position, {short(model.info.name)}, {len(rows)} contexts"
    draw_curves(out / "next-token.svg", shown, title=title, y="Precision@1")
    write_page(
        out / "next-token.md",
        title=f"Next token (section 4.1): {model.info.name}",
        command=command,
        parts=[
            _said(model, curves, n_rows=len(rows), texts=texts),
            "![Precision@1 by layer](next-token.svg)\n",
            _table(shown),
        ],
    )


def sweep(recipe: str, model: Model, rows: list[dict[str, str]], work: Path) -> Any:
    """The table of one recipe; it goes on where an earlier call was stopped."""
    found = ps.run(
        ps.load_recipe(recipe),
        model=model,
        data=rows,
        controls=list(CONTROLS),
        metrics=list(METRICS),
        out=work / f"{recipe}-{short(model.info.name)}",
    )
    return found.table()


def _curves(method: str, table: Any) -> list[Curve]:
    found = []
    for control in (None, *CONTROLS):
        of = table[table["control"].isna() if control is None else table["control"] == control]
        for metric in METRICS:
            grid = of.pivot_table(index="row", columns="source_layer", values=metric)
            found.append(Curve(method, control, metric, grid.to_numpy(dtype=np.float64)))
    return found


def middle(n_layers: int) -> range:
    """The layers that are judged: 14 to 22 of 24; from the same share of the depth to the last but one."""
    return range(round(n_layers * 14 / 24), n_layers - 1)


def _said(model: Model, curves: list[Curve], *, n_rows: int, texts: Path) -> str:
    """What is judged, in words."""
    of: Mapping[tuple[str, str | None], NDArray[np.float64]] = {
        (curve.method, curve.control): curve.values for curve in curves if curve.metric == "precision_at_1"
    }
    chosen = list(middle(model.info.n_layers))
    identity, lens = of["token identity", None], of["logit lens", None]
    gain = interval((identity - lens)[:, chosen].mean(axis=1))
    between = f"{chosen[0]} to {chosen[-1]}"
    lines = [
        (
            f"{n_rows} contexts of {texts.parent.name}/{texts.name}, {model.info.dtype}; "
            "means with 95 % bootstrap intervals over contexts."
        ),
        "",
        (
            f"- Averaged over layers {between}: token identity {_mean(identity, chosen)}, "
            f"logit lens {_mean(lens, chosen)}; paired difference {gain}."
        ),
        *(
            f"- Token identity, {control}, over these layers: {_mean(values, chosen)}; "
            f"its highest layer, of all, has {values.mean(axis=0).max():.3f}."
            for control in CONTROLS
            for values in (of["token identity", control],)
        ),
        f"- Last layer: token identity {identity[:, -1].mean():.3f}, logit lens {lens[:, -1].mean():.3f}.",
    ]
    return "\n".join(lines) + "\n"


def _mean(values: NDArray[np.float64], chosen: list[int]) -> Interval:
    return interval(values[:, chosen].mean(axis=1))


def _table(shown: Mapping[str, tuple[list[int], list[Interval]]]) -> str:
    names = list(shown)
    layers = shown[names[0]][0]
    return markdown(
        ["layer", *names], [[layer, *(shown[name][1][layer] for name in names)] for layer in layers]
    )
