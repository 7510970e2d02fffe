"""The pairs of layers that are fitted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from patchscope_nn.errors import LayerError
from patchscope_nn.mappings import Pair
from patchscope_nn.spec.layers import EMBED, parse_layers, resolve_layers

_NAMED = ("same", "last", "cross")
_PAIR = re.compile(r"^(embed|-?\d+):(embed|-?\d+)$")


def parse_pairs(
    pairs: str | Sequence[Any],
    *,
    n_source: int,
    n_target: int,
    source_layers: Any = "all",
    target_layers: Any = "all",
    one_model: bool = False,
) -> tuple[Pair, ...]:
    """Resolve a selection of layer pairs (l, l*), and return them sorted.

    Args:
        pairs: `same` (l to l* = l), `last` (l to the last block), `cross` (every l to every l*), or pairs:
            `"3:5"`, `"embed:0,3:5"`, `[(3, 5)]`; negative numbers count from the end.
        n_source: The number of blocks of the source model.
        n_target: The number of blocks of the target model.
        source_layers: The l of `same`, `last` and `cross`, as in `Source.layer`.
        target_layers: The l* of `cross`.
        one_model: True if both are one model; pairs of a layer with itself are then left out.

    Raises:
        LayerError: `pairs` cannot be read, names layers outside the models, or leaves no pair.
    """
    if isinstance(pairs, str) and pairs in _NAMED:
        sources = _layers(source_layers, n_layers=n_source, field="source_layers")
        targets = _layers(target_layers, n_layers=n_target, field="target_layers")
        selected = {
            "same": [(layer, layer) for layer in sources if layer < n_target],
            "last": [(layer, n_target - 1) for layer in sources],
            "cross": [(layer, target) for layer in sources for target in targets],
        }[pairs]
    else:
        items = pairs.split(",") if isinstance(pairs, str) else pairs
        selected = [_pair(item, n_source=n_source, n_target=n_target) for item in items]
    if one_model:
        selected = [pair for pair in selected if pair[0] != pair[1]]
    if not selected:
        raise LayerError(
            f"pairs={pairs!r} leaves nothing to fit"
            + (": a layer of one model needs no map to itself." if one_model else "."),
            hint="Use pairs last or cross, name pairs as l:l*, or give another target model.",
        )
    return tuple(sorted(set(selected)))


def _layers(selector: Any, *, n_layers: int, field: str) -> tuple[int, ...]:
    try:
        parsed = parse_layers(selector)
    except ValueError as error:
        raise LayerError(f"{field}: {error}.") from None
    return resolve_layers(parsed, n_layers=n_layers, field=field)


def _pair(item: Any, *, n_source: int, n_target: int) -> Pair:
    match = _PAIR.match(item.strip()) if isinstance(item, str) else None
    layers = match.groups() if match else item
    if isinstance(layers, str) or not isinstance(layers, Sequence) or len(layers) != 2:  # noqa: PLR2004 (l, l*)
        raise LayerError(
            f"{item!r} is not a valid pair of layers.",
            hint=f"Use {', '.join(_NAMED)}, or pairs like 3:5 or embed:0, separated by commas.",
        )
    # `resolve_layers` takes the input of block 0 only by its name.
    source, target = ("embed" if layer in ("embed", EMBED) else int(layer) for layer in layers)
    return (
        resolve_layers(source, n_layers=n_source, field="pairs: l")[0],
        resolve_layers(target, n_layers=n_target, field="pairs: l*")[0],
    )
