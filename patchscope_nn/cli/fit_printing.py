"""Printing of fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscope_nn.cli.printing import grid, out, out_json, show

if TYPE_CHECKING:
    from patchscope_nn.mappings import Fitted


def print_closed_fit(fitted: Fitted, *, file: Path, as_json: bool) -> None:
    """Print the scores of a fit in closed form, pair by pair, and its file."""
    if as_json:
        out_json({"file": str(file), **fitted.said()})
        return
    settings = {(layer, target): chosen for layer, target, chosen in fitted.about.settings["pairs"]}
    names = _chosen_names(settings)
    table = grid("l -> l*", "of variance", "cosine", "of the mean", "n", *names)
    for pair in fitted.pairs:
        scores = fitted.about.held_out[pair]
        source, target = ("embed" if layer < 0 else str(layer) for layer in pair)
        table.add_row(
            f"{source} -> {target}",
            *(f"{scores[name]:.3f}" for name in ("fraction_of_variance", "cosine", "cosine_of_mean")),
            str(scores["n"]),
            *(f"{settings[pair][name]:g}" for name in names),
        )
    fitted_on, held_out = fitted.about.data["fitted_on"], fitted.about.data["held_out"]
    show(table)
    out(
        f"\n{fitted.kind}, {fitted.about.source_model.name} -> {fitted.about.target_model.name}; fitted on "
        f"{fitted_on['n_positions']} positions of {fitted_on['n_texts']} texts, scored on "
        f"{held_out['n_positions']} of {held_out['n_texts']} that were held out\n{file}"
    )


def _chosen_names(settings: Mapping[tuple[int, int], Mapping[str, Any]]) -> list[str]:
    """The settings that were chosen for each pair."""
    return [name for name in ("lambda", "alpha") if any(name in chosen for chosen in settings.values())]


def print_fit(metadata: dict[str, Any], file: Path, *, as_json: bool) -> None:
    """Print the scores of a trained fit, and its file; `metadata` is that of the file."""
    if as_json:
        out_json({"file": str(file), **metadata})
        return
    rows = [(*pair, numbers) for *pair, numbers in metadata["held_out"]]
    names = list(dict.fromkeys(name for *_, numbers in rows for name in numbers))
    table = grid("l", "l*", *names, title=f"{metadata['kind']}, on held-out data")
    for source, target, numbers in rows:
        layers = ("embed" if layer < 0 else str(layer) for layer in (source, target))
        table.add_row(*layers, *(_number(numbers.get(name)) for name in names))
    show(table)
    out(str(file))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
