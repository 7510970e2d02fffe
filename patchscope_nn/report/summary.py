"""A run in plain sentences, and short facts about it, from its table and its manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patchscope_nn.analysis.statistics import REAL, best_over, is_higher_better, numbers
from patchscope_nn.metrics import described
from patchscope_nn.report.figures.table import (
    by_scale,
    layer_means,
    layer_name,
    sinks,
    with_probe_controls,
)
from patchscope_nn.report.figures.text import listed, shorten
from patchscope_nn.spec import RESIDUAL, SITES, Readout, kinds_in

if TYPE_CHECKING:
    import pandas as pd

_CONTROLS = {
    "unpatched": "the target prompt with nothing written into it",
    "random": "a random state of the same norm (for an attention cut: as many other tokens)",
    "shuffled": "the state of another data row",
    "text-only": "the target prompt with the source text in place of the state",
}


def summary(table: pd.DataFrame, *, manifest: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """Describe a run in plain sentences; of its metrics, only the first is reported."""
    if table.empty:
        return ["This run has no cells yet."]
    controls = table["control"].value_counts()
    sentences = [_opening(table, manifest=manifest), _counts(table, controls=controls)]
    failed = int(table["error"].notna().sum()) if "error" in table.columns else 0
    if failed:
        sentences.append(f"{_count(failed, 'cell')} failed; the table of cells has the reasons.")
    if metrics:
        sentences.append(_headline(with_probe_controls(table), metric=metrics[0], manifest=manifest))
    if controls.empty and "probe_shuffled_accuracy" not in table.columns:
        sentences.append(
            "No control was run, so a convincing answer does not yet show that the state caused it."
        )
    return sentences


def facts(table: pd.DataFrame, *, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return short facts for the head of the page, as (name, value)."""
    recipe = section(manifest, "recipe")
    at_sink = int(sinks(table).sum())
    elapsed = section(manifest, "timings").get("elapsed_s")
    values = {
        "Recipe": recipe.get("name"),
        "Paper": recipe.get("paper"),
        "Source model": ", ".join(map(str, _distinct(table, column="source_model"))),
        "Target model": ", ".join(map(str, _distinct(table, column="target_model"))),
        "Mapping": ", ".join(map(str, _distinct(table, column="mapping"))),
        "Attention-sink cells (position 0)": f"{at_sink:,}" if at_sink else None,
        "Seed": manifest.get("seed"),
        "Time": f"{elapsed:.3g} s" if isinstance(elapsed, int | float) else None,
        "Created": manifest.get("created"),
    }
    return [(name, shorten(value, width=300)) for name, value in values.items() if value not in (None, "")]


def described_controls(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the controls of a table, each with a description."""
    return [(name, _CONTROLS[name]) for name in _CONTROLS if (table["control"] == name).any()]


def metric_names(manifest: Mapping[str, Any]) -> list[str]:
    """The names of a run's metrics, in the order of its recipe."""
    return [entry["name"] for entry in manifest.get("metrics") or ()]


def section(manifest: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the mapping under nested keys of a manifest, or {} if it is missing or something else."""
    for key in keys:
        value = manifest.get(key)
        manifest = value if isinstance(value, Mapping) else {}
    return manifest


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _distinct(table: pd.DataFrame, *, column: str) -> list[Any]:
    return [] if column not in table.columns else list(table[column].dropna().unique())


def _layers(table: pd.DataFrame) -> str:
    """Name the source layers: a single layer, or their number with the first and last."""
    layers = sorted(set(numbers(table["source_layer"].dropna())))
    if len(layers) <= 1:
        return f"layer {layer_name(layers[0])}" if layers else "no layer"
    return f"{len(layers)} layers ({layer_name(layers[0])} to {layer_name(layers[-1])})"


def _opening(table: pd.DataFrame, *, manifest: Mapping[str, Any]) -> str:
    """Say which states were read, where they were written, and what the target model did."""
    named = section(manifest, "models", "source").get("name") or "a model"
    source = _distinct(table, column="source_model") or [named]
    target = _distinct(table, column="target_model") or source
    action = next((kind.action for kind in kinds_in(table.columns)), Readout.action)
    read = table[["source_prompt"]][table["source_layer"].notna()]
    prompts = _count(len(_distinct(read, column="source_prompt")), "source prompt")
    result = action.format(listed(target))
    if section(manifest, "recipe").get("probe"):
        return f"A linear probe read hidden states of {listed(source)} at {_layers(table)}, from {prompts}."
    if _cuts(manifest):
        return (
            f"In {prompts}, attention from some tokens to others was cut in blocks around {_layers(table)};"
            f" {result}."
        )
    name = section(manifest, "recipe", "source").get("site") or RESIDUAL.name
    site = SITES.get(name)  # it may not be registered where the report is made
    states = (site and site.label) or f"States at {name}"
    corrupted = section(manifest, "recipe", "target").get("corrupt")
    noise = " with noise on some of its embeddings" if corrupted else ""
    return (
        f"{states} of {listed(source)} at {_layers(table)} were taken from {prompts} and written into a"
        f" target prompt{noise}; {result}."
    )


def _counts(table: pd.DataFrame, *, controls: pd.Series) -> str:
    """Count the cells of each kind; `controls` has the number of cells of each control."""
    kinds = listed(f"{controls[name]:,} {name}" for name in table["control"].dropna().unique())
    return (
        f"There are {_count(len(table), 'cell')} over {_count(table['row'].nunique(), 'data row')}:"
        f" {len(table) - int(controls.sum()):,} patched{f', and {kinds} as controls' if kinds else ''}."
    )


def _cuts(manifest: Mapping[str, Any]) -> bool:
    """True if the run cuts attention around each layer instead of reading a state there."""
    return bool(section(manifest, "recipe", "target", "write").get("cut"))


def _headline(table: pd.DataFrame, *, metric: str, manifest: Mapping[str, Any]) -> str:
    """Say at which layer a metric is best, and what its controls reach there."""
    over, known = tuple(section(manifest, "recipe").get("best_over") or ()), described(manifest)
    cells = best_over(table, metric=metric, over=over, known=known) if over else table
    means = [
        mean | {"scale": name}
        for name, part in by_scale(cells).items()
        for mean in layer_means(part, metric=metric).to_dict("records")
    ]
    real = [mean for mean in means if mean["control"] == REAL]
    if not real:
        return f"No patched cell has a value of {metric}."
    higher = is_higher_better(metric, known)
    best = (max if higher else min)(real, key=lambda mean: mean["mean"])
    controls = ", ".join(_at_place(best, means=[mean for mean in means if mean["scale"] == best["scale"]]))
    name = f"{metric} (each row's best over {' and '.join(over).replace('_', ' ')})" if over else metric
    place = _place(best, cut=_cuts(manifest))
    where = f"is {'highest' if higher else 'lowest'} at {place}" if place else "over all layers"
    value = _with_interval(best, label="95 % interval ")
    return (
        f"Mean {name} {where}: {value}, n = {_count(best['n_rows'], 'data row')}"
        f"{f'; controls at the same place: {controls}' if controls else ''}."
    )


def _place(mean: Mapping[Any, Any], *, cut: bool) -> str:
    source, target = mean["source_layer"], mean["target_layer"]
    places = []
    if not math.isnan(source):  # NaN if the best was taken over the source layers
        places.append(f"{'' if cut else 'source '}layer {layer_name(source)}")
    if not math.isnan(target) and target != source:
        places.append(f"target layer {layer_name(target)}")
    return " and ".join([*places, *([mean["scale"]] if mean["scale"] else [])])


def _at_place(best: Mapping[Any, Any], *, means: Sequence[Mapping[Any, Any]]) -> Iterator[str]:
    """Yield the means of the controls at the layers of the best mean, and of those that read no layer."""
    for mean in means:
        there = all(
            mean[side] == best[side] or (math.isnan(mean[side]) and math.isnan(best[side]))
            for side in ("source_layer", "target_layer")
        )
        if mean["control"] != REAL and (there or math.isnan(mean["source_layer"])):
            yield f"{mean['control']} {_with_interval(mean)}"


def _with_interval(mean: Mapping[Any, Any], *, label: str = "") -> str:
    low, high = mean["low"], mean["high"]
    return f"{mean['mean']:.3g}" + ("" if math.isnan(low) else f" ({label}{low:.3g} to {high:.3g})")
