"""Section 4.4: states of a small model read by a larger one, through maps fitted on other texts.

For each pair (l, l*) one affine map, by ridge regression on texts that no context is taken from. The mapped
state is written into the token-identity prompt of the larger model, which is right where its top token is the
small model's own next token. Three controls know nothing of the state: another context's and a random one of
the same norm, mapped alike; and the mean state of the larger model, which is what a ridge regression with an
endless penalty maps everything to.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import patchscope_nn as ps
from benchmarks.quality.contexts import SEED, contexts, passages
from benchmarks.quality.intervals import Interval, interval
from benchmarks.quality.models import short
from benchmarks.quality.write import markdown, write_csv, write_page
from patchscope_nn.models import Model
from patchscope_nn.spec import prompts

#: A penalty so large that the weight is nothing, and the bias the mean of the target's states.
ENDLESS = 1e9
CONTROLS = ("shuffled", "random")
#: How many texts the mean is taken of, which needs fewer than a map.
MEAN_OF = 40
_TOKENS = 96
Grid = NDArray[np.float64]


def run(
    source: Model,
    target: Model,
    *,
    fit_on: Path,
    texts: Path,
    layers: Sequence[int],
    target_layers: Sequence[int],
    fitted: int,
    count: int,
    work: Path,
    out: Path,
    command: str,
) -> None:
    """Fit the maps, sweep the pairs of layers with the controls, and write Precision@1 of each pair."""
    rows = contexts(texts, model=source, count=count)
    read, between = chosen(fit_on, fitted), {"layers": layers, "target_layers": target_layers}
    affine = fit(source, target, texts=read, notice=print, **between)
    mean = fit(source, target, texts=read[:MEAN_OF], lambdas=(ENDLESS,), **between)
    sides: dict[str, Any] = {"layers": layers, "target_layers": target_layers, "rows": rows, "work": work}
    mapped = sweep(affine, source, target, name="affine", controls=CONTROLS, **sides)
    average = sweep(mean, source, target, name="mean", controls=(), **sides)
    grids = {
        "affine": _grid(mapped, None),
        **{control: _grid(mapped, control) for control in CONTROLS},
        "mean state": _grid(average, None),
    }
    write_csv(
        out / "cross-model.csv",
        [
            {
                "method": name,
                "layer": layer,
                "target_layer": other,
                "n": len(rows),
                **interval(grid[:, place, column])._asdict(),
            }
            for name, grid in grids.items()
            for place, layer in enumerate(layers)
            for column, other in enumerate(target_layers)
        ],
    )
    said = (
        f"{len(rows)} contexts of {texts.parent.name}/{texts.name}; {source.info.dtype} and "
        f"{target.info.dtype}; {fitted_on(affine, fit_on, fitted)} for the last table.\n"
    )
    layout = "rows l, columns l*.\n\n"
    variance = _variance(affine.about.held_out, layers, target_layers)
    parts = [
        said,
        _best(grids, layers, target_layers),
        *(
            f"## {name}\n\nPrecision@1; {layout}{_heat(grid.mean(axis=0), layers, target_layers)}"
            for name, grid in grids.items()
        ),
        f"## How well the maps fit\n\nFraction of the variance of target states on held-out texts; {layout}"
        + _heat(variance, layers, target_layers),
    ]
    title = f"Cross-model (section 4.4): {source.info.name} -> {target.info.name}"
    write_page(out / "cross-model.md", title=title, command=command, parts=parts)


def chosen(fit_on: Path, count: int) -> list[str]:
    """Passages of a file, for maps to be fitted on."""
    return random.Random(SEED).sample(passages(fit_on), count)  # noqa: S311 (a seeded choice, no secret)


def fit(
    source: Model,
    target: Model,
    *,
    texts: Sequence[str],
    layers: Sequence[int],
    target_layers: Sequence[int],
    **options: Any,
) -> Any:
    """One affine map for each pair of layers."""
    return ps.fit(
        "affine",
        model=source,
        target_model=target,
        pairs=[(layer, other) for layer in layers for other in target_layers],
        data={"rows": [{"text": text} for text in texts]},
        positions=None,
        max_tokens=_TOKENS,
        **options,
    )


def fitted_on(affine: Any, fit_on: Path, count: int) -> str:
    """What maps were fitted on, in words."""
    return (
        f"maps fitted on {affine.about.data['fitted_on']['n_positions']} positions of {count} passages of "
        f"{fit_on.parent.name}/{fit_on.name}, of which some choose lambda or are held out"
    )


def sweep(
    mapping: Any,
    source: Model,
    target: Model,
    *,
    name: str,
    controls: Sequence[Any],
    layers: Sequence[int],
    target_layers: Sequence[int],
    rows: list[dict[str, str]],
    work: Path,
) -> Any:
    """The table of one mapping; it goes on where an earlier call was stopped."""
    scope = ps.Patchscope(
        source=ps.Source(prompt="{context}", position=-1, layer=list(layers)),
        target=ps.Target(prompt=prompts.IDENTITY, position=-1, layer=list(target_layers)),
        mapping=mapping,
        readout=ps.NextToken(top_k=5, reference="source"),
    )
    return ps.run(
        scope,
        source_model=source,
        target_model=target,
        data=rows,
        controls=list(controls),
        metrics=["precision_at_1"],
        out=work / f"cross-{name}-{short(source.info.name)}-{short(target.info.name)}",
    ).table()


def _grid(table: Any, control: str | None) -> Grid:
    """(n_rows, n_layers, n_target_layers)"""
    of = table[table["control"].isna() if control is None else table["control"] == control]
    flat = of.pivot_table(
        index="row", columns=["source_layer", "target_layer"], values="precision_at_1"
    ).sort_index(axis=1)
    shape = (len(flat), of["source_layer"].nunique(), of["target_layer"].nunique())
    return np.asarray(flat.to_numpy(dtype=np.float64)).reshape(shape)


def _best(grids: dict[str, Grid], layers: Sequence[int], target_layers: Sequence[int]) -> str:
    """Each method at its own best pair, and over all pairs; the controls choose as freely as the maps do."""
    rows = []
    for name, grid in grids.items():
        means = grid.mean(axis=0)
        place, column = np.unravel_index(means.argmax(), means.shape)
        best = interval(grid[:, place, column])
        rows.append([name, f"{layers[place]} -> {target_layers[column]}", best, _over(grid)])
    gains = [
        f"- Affine minus {name}, paired, over all pairs: {_over(grids['affine'] - grid)}."
        for name, grid in grids.items()
        if name != "affine"
    ]
    table = markdown(["method", "its best pair", "there", "mean over all pairs"], rows)
    return table + "\n" + "\n".join(gains) + "\n"


def _over(grid: Grid) -> Interval:
    return interval(grid.mean(axis=(1, 2)))


def _heat(means: Grid, layers: Sequence[int], target_layers: Sequence[int]) -> str:
    return markdown(
        ["l \\ l*", *target_layers],
        [
            [layer, *(f"{one:.2f}" for one in line)]
            for layer, line in zip(layers, means.tolist(), strict=True)
        ],
    )


def _variance(held_out: Any, layers: Sequence[int], target_layers: Sequence[int]) -> Grid:
    return np.array(
        [[held_out[layer, other]["fraction_of_variance"] for other in target_layers] for layer in layers]
    )
