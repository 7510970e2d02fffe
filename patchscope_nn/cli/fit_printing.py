"""How fits are printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscope_nn.cli.printing import grid, out, out_json, show

if TYPE_CHECKING:
    from patchscope_nn.mappings import Fitted


def print_closed_fit(fitted: Fitted, *, file: Path, as_json: bool) -> None:
    """Print the numbers of a fit, pair by pair, and where it is."""
    data = fitted.about.data
    if as_json:
        out_json({"file": str(file), **fitted.said()})
        return
    settings = {tuple(one[:2]): one[2] for one in fitted.about.settings["pairs"]}
    table = grid("l -> l*", "of variance", "cosine", "of the mean", "n", *_chosen(settings))
    for pair in fitted.pairs:
        found, chosen = fitted.about.held_out[pair], settings[pair]
        source, target = ("embed" if layer < 0 else str(layer) for layer in pair)
        table.add_row(
            f"{source} -> {target}",
            *(f"{found[name]:.3f}" for name in ("fraction_of_variance", "cosine", "cosine_of_mean")),
            str(found["n"]),
            *(f"{chosen[name]:g}" for name in _chosen(settings)),
        )
    one, other = data["fitted_on"], data["held_out"]
    show(table)
    out(
        f"\n{fitted.kind}, {fitted.about.source_model.name} -> {fitted.about.target_model.name}; fitted on "
        f"{one['n_positions']} positions of {one['n_texts']} texts, measured on {other['n_positions']} of "
        f"{other['n_texts']} that were held out\n{file}"
    )


def _chosen(settings: Mapping[tuple[int, int], Mapping[str, Any]]) -> list[str]:
    """What was chosen for each pair."""
    return [name for name in ("lambda", "alpha") if any(name in one for one in settings.values())]


def print_fit(said: dict[str, Any], file: Path, *, as_json: bool) -> None:
    """Print what a fit does on what was held out, and where it is."""
    if as_json:
        out_json({"file": str(file), **said})
        return
    rows = [(*pair, numbers) for *pair, numbers in said["held_out"]]
    names = list(dict.fromkeys(name for *_, numbers in rows for name in numbers))
    table = grid("l", "l*", *names, title=f"{said['kind']}, on what was held out")
    for source, target, numbers in rows:
        layers = ("embed" if layer < 0 else str(layer) for layer in (source, target))
        table.add_row(*layers, *(_number(numbers.get(name)) for name in names))
    show(table)
    out(str(file))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
