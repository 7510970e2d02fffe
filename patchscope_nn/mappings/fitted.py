"""Fitted mappings: one map for each pair of layers, saved with their provenance in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from patchscope_nn._util.arguments import checked_class
from patchscope_nn._util.files import replacing
from patchscope_nn.body.mappings import Pair, Parts, map_parts
from patchscope_nn.errors import MappingError
from patchscope_nn.mappings.provenance import Provenance

#: The key under which the file's metadata holds a JSON object.
METADATA = "patchscope_nn"
_FORMS = ({"weight"}, {"up", "down"}, {"scale"})
_PARTS = ("weight", "up", "down", "scale", "bias")
#: How many pairs a message lists.
_LISTED = 40


@checked_class
class Fitted(torch.nn.Module):
    """f(h) = (weight h | up (down h) | scale h) + bias, with separate tensors for each pair (l, l*).

    Args:
        kind: The kind of fit: `affine`, `orthogonal`, `low_rank`, `scale`, `tuned_lens`, ...
        maps: For each (l, l*) its tensors: `weight` (d_out, d_in), or `up` (d_out, r) and `down` (r, d_in),
            or `scale` (1,); and optionally `bias` (d_out,). l = -1 is the input of block 0.
        about: Where it comes from.

    Attributes:
        pairs: The pairs it has a map for, sorted.

    Raises:
        MappingError: A pair's tensors do not make a map between the two spaces, or are not finite.
    """

    def __init__(
        self, *, kind: str, maps: Mapping[Pair, Mapping[str, torch.Tensor]], about: Provenance
    ) -> None:
        super().__init__()
        if not maps:
            raise MappingError("a fitted mapping needs the map of at least one pair of layers.")
        self.kind, self.about = kind, about
        self.pairs: tuple[Pair, ...] = tuple(sorted((int(layer), int(target)) for layer, target in maps))
        self._names: dict[Pair, tuple[str, ...]] = {}
        for pair in self.pairs:
            _check_parts(pair, maps[pair], about)
            self._names[pair] = tuple(name for name in _PARTS if name in maps[pair])
            for name in self._names[pair]:
                tensor = maps[pair][name].detach().clone().contiguous()
                self.register_buffer(_buffer(name, pair), tensor)

    def parts(self, pair: Pair) -> dict[str, torch.Tensor]:
        """The tensors of a pair's map, by name; a pair without a map is a `MappingError`."""
        if pair not in self._names:
            raise MappingError(f"no map was fitted for {pair_text(pair)}.", hint=self.listed)
        return {name: self.get_buffer(_buffer(name, pair)) for name in self._names[pair]}

    def forward(self, states: torch.Tensor, layer: int, target_layer: int) -> torch.Tensor:
        """Map states of layer l, (..., d_in), to layer l*, (..., d_out).

        The result has the dtype and the device of the maps.

        Raises:
            MappingError: It has no map for the pair.
        """
        return map_parts(self.parts((layer, target_layer)), states)

    def chosen(self, pairs: Iterable[Pair]) -> dict[Pair, Parts]:
        """The maps of some pairs as plain tensors, which can enter a context."""
        return {pair: self.parts(pair) for pair in pairs}

    @property
    def listed(self) -> str:
        """A sentence that lists its pairs."""
        return f"It has maps for {listed(self.pairs)}."

    def save(self, file: str | Path) -> Path:
        """Write a safetensors file, completely or not at all.

        Tensors are named `weight.L.T`, `up.L.T`, `down.L.T`, `scale.L.T` and `bias.L.T` for a pair (L, T).
        The metadata holds kind, models, pairs and provenance as JSON, under `patchscope_nn`.

        Raises:
            MappingError: It cannot be written.
        """
        from safetensors.torch import save_file

        file = Path(file)
        tensors = {
            _key(name, pair): tensor for pair in self.pairs for name, tensor in self.parts(pair).items()
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as draft:
                save_file(tensors, draft, metadata={METADATA: json.dumps(self.said())})
        except OSError as error:
            raise MappingError(
                f"{file} cannot be written: {error}.", hint="Name another file (--out)."
            ) from error
        return file

    def said(self) -> dict[str, Any]:
        """The file's metadata: kind, pairs and provenance."""
        return {"kind": self.kind, "pairs": [list(pair) for pair in self.pairs], **self.about.dump()}

    @classmethod
    def load(cls, file: str | Path, *, pairs: Iterable[Pair] | None = None) -> Fitted:
        """Read what `save` wrote.

        Args:
            file: The safetensors file.
            pairs: The pairs to read; None reads all.

        Raises:
            MappingError: The file cannot be read, holds no fitted mapping, or lacks the map of a pair.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                kind, fitted, about = _read_metadata(opened.metadata(), file)
                chosen = fitted if pairs is None else [*dict.fromkeys(pairs)]
                if missing := sorted(set(chosen) - set(fitted)):
                    raise MappingError(
                        f"mapping.fitted={str(file)!r} has no map for {listed(missing)}.",
                        hint=f"It has maps for {listed(fitted)}.",
                    )
                keys = set(opened.keys())
                maps = {
                    pair: {
                        name: opened.get_tensor(_key(name, pair))
                        for name in _PARTS
                        if _key(name, pair) in keys
                    }
                    for pair in chosen
                }
        except (OSError, SafetensorError) as error:
            raise MappingError(
                f"mapping.fitted={str(file)!r} cannot be read: {error}.",
                hint="Give a file that `patchscope fit` wrote.",
            ) from error
        return cls(kind=kind, maps=maps, about=about)


def pair_text(pair: Pair) -> str:
    """A pair of layers as messages write it, `l:l*`."""
    source, target = ("embed" if layer < 0 else str(layer) for layer in pair)
    return f"{source}:{target}"


def listed(pairs: Iterable[Pair]) -> str:
    """Pairs of layers as messages list them."""
    texts = [pair_text(pair) for pair in pairs]
    more = f", ... ({len(texts)} in all)" if len(texts) > _LISTED else ""
    return f"(l:l*) {', '.join(texts[:_LISTED])}{more}"


def _buffer(name: str, pair: Pair) -> str:
    return f"{name}_{pair[0]}_{pair[1]}"


def _key(name: str, pair: Pair) -> str:
    return f"{name}.{pair[0]}.{pair[1]}"


def _read_metadata(texts: Mapping[str, str] | None, file: str | Path) -> tuple[str, list[Pair], Provenance]:
    """Return the kind, the pairs and the provenance in a file's metadata."""
    if METADATA not in (texts or {}):
        raise MappingError(
            f"mapping.fitted={str(file)!r} does not say what it was fitted on.",
            hint="Give a file that `patchscope fit` wrote; a bare weight goes into {affine: file}.",
        )
    try:
        metadata = dict(json.loads((texts or {})[METADATA]))
        kind = metadata.pop("kind")
        pairs = [(int(layer), int(target)) for layer, target in metadata.pop("pairs")]
        return kind, pairs, Provenance.parse(metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise MappingError(
            f"mapping.fitted={str(file)!r} has metadata that cannot be read: {error}.",
            hint="Give a file that `patchscope fit` wrote.",
        ) from error


def _check_parts(pair: Pair, parts: Mapping[str, torch.Tensor], about: Provenance) -> None:
    d_in, d_out = about.source_model.d_model, about.target_model.d_model
    if set(parts) - {"bias"} not in _FORMS:
        raise MappingError(
            f"the map of {pair_text(pair)} has {sorted(parts)}; it should have 'weight', or 'up' and 'down', "
            "or 'scale', and may have 'bias'."
        )
    rank = parts["down"].shape[0] if "down" in parts and parts["down"].ndim else 0
    shapes = {
        "weight": (d_out, d_in),
        "up": (d_out, rank),
        "down": (rank, d_in),
        "scale": (1,),
        "bias": (d_out,),
    }
    for name, tensor in parts.items():
        if tuple(tensor.shape) != shapes[name]:
            raise MappingError(
                f"{name} of {pair_text(pair)} has shape {tuple(tensor.shape)}; should be {shapes[name]}: it "
                f"maps {about.source_model} to {about.target_model}."
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise MappingError(f"{name} of {pair_text(pair)} holds values that are not finite numbers.")
    if "scale" in parts and d_in != d_out:
        raise MappingError(
            f"a scale maps between spaces of one size; {about.source_model} and {about.target_model} differ.",
            hint="Fit an affine map instead.",
        )
