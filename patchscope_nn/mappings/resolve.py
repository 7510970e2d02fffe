"""Resolves the mapping that a Patchscope names: loads it, and checks it against both models."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from patchscope_nn._util.functions import function_bytes, import_function, value_bytes
from patchscope_nn.body.mappings import Pair, Parts
from patchscope_nn.errors import MappingError
from patchscope_nn.mappings.affine import Affine
from patchscope_nn.mappings.fitted import Fitted, listed
from patchscope_nn.mappings.provenance import Space
from patchscope_nn.mappings.published import PUBLISHED, load_published
from patchscope_nn.models import ModelInfo
from patchscope_nn.spec import NAMED_MAPPINGS, RESIDUAL, dump_mapping
from patchscope_nn.spec.mapping import MAPPINGS


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedMapping:
    """A mapping that is ready to enter a context.

    Attributes:
        name: Its name in tables and manifests.
        kind: `identity`, `target_norm`, `call` or `pairs`.
        call: For `call`, a function from (..., d_model) to (..., d_model of the target).
        maps: For `pairs`, the tensors of each (l, l*).
        digest: A hex digest of its weights; empty if it has none.
        about: For `pairs`, the metadata of the fit, limited to these pairs.
        notices: Sentences that warn its user.
        decided_by: For a fit or a training that a recipe asks for, a digest of everything that decides each
            of its maps; else empty.
    """

    name: str
    kind: str
    call: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False)
    maps: Mapping[Pair, Parts] = field(default_factory=dict, repr=False)
    digest: str = ""
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notices: tuple[str, ...] = ()
    decided_by: str = ""

    def within(self, pairs: Iterable[Pair]) -> Any:
        """What a context needs to map states of these pairs: a function, tensors or nothing."""
        return {pair: self.maps[pair] for pair in sorted(set(pairs))} if self.kind == "pairs" else self.call

    def digests(self) -> dict[str, str]:
        """Return a digest of the weights of each map, by `l:l*`; a single one, `all`, if that decides all."""
        if self.kind != "pairs" or self.decided_by:
            return {"all": self.decided_by or self.digest}
        return {
            f"{pair[0]}:{pair[1]}": _digest(_bytes_of_map(pair, parts)) for pair, parts in self.maps.items()
        }


def resolve_mapping(
    mapping: Any,
    *,
    source: ModelInfo,
    target: ModelInfo,
    pairs: Sequence[Pair] = (),
    sites: tuple[str, str] = (RESIDUAL.name, RESIDUAL.name),
) -> ResolvedMapping:
    """Load a Patchscope's mapping, and check on two states that it maps between two models.

    Args:
        mapping: The `mapping` of a Patchscope.
        source: The model whose states it takes.
        target: The model whose hidden space it maps to.
        pairs: Every (l, l*) of the run; a fitted mapping needs a map for each.
        sites: The names of the sites that are read and written.

    Raises:
        MappingError: It cannot be loaded, does not take (n, d_model) to (n, d_model of the target), or has
            no map for one of the pairs.
    """
    spaces = Space.of(source, site=sites[0]), Space.of(target, site=sites[1])
    if mapping in NAMED_MAPPINGS:
        width, other_width = (space.d_model for space in spaces)
        if width != other_width:
            raise MappingError(
                f"mapping: {mapping} needs hidden states of one size; the source's have {width} "
                f"({source.name}), the target's {other_width} ({target.name}).",
                hint="Give an affine mapping: {affine: weights.safetensors}.",
            )
        return ResolvedMapping(name=mapping, kind=mapping)
    if isinstance(mapping, Fitted):
        return _resolve_fitted(mapping, "fitted", spaces=spaces, pairs=pairs)
    if isinstance(mapping, tuple) and mapping[0] in ("fitted", *PUBLISHED):
        kind, file = mapping
        name = f"{kind}:{Path(file).name}"
        if kind in PUBLISHED:
            return _resolve_fitted(load_published(kind, file, info=source), name, spaces=spaces, pairs=pairs)
        resolved = _resolve_fitted(Fitted.load(file, pairs=pairs or None), name, spaces=spaces, pairs=pairs)
        with Path(file).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return replace(resolved, about={"file": str(file), "sha256": digest, **resolved.about})
    call, name = _load(mapping)
    _check_shape(call, name, *spaces)
    return ResolvedMapping(name=name, kind="call", call=call, digest=_digest(_bytes_of(call)))


def _resolve_fitted(
    fitted: Fitted, name: str, *, spaces: tuple[Space, Space], pairs: Sequence[Pair]
) -> ResolvedMapping:
    """Check a fitted mapping against the models and layers of a sweep, and keep the maps it needs."""
    notices = []
    fits = fitted.about.source_model, fitted.about.target_model
    for side, fit, space in zip(("source", "target"), fits, spaces, strict=True):
        if (fit.d_model, fit.site) != (space.d_model, space.site):
            raise MappingError(
                f"mapping {name} was fitted for the {side} {fit}, site {fit.site}; this run's is "
                f"{space}, site {space.site}.",
                hint="Fit one for these models: patchscope fit.",
            )
        if (fit.name, fit.revision) != (space.name, space.revision):
            notices.append(
                f"mapping {name} was fitted for the {side} {fit}; this run's is {space}. Unless "
                "these have the same weights, it is applied to states unlike those it was fitted on."
            )
    chosen = tuple(dict.fromkeys(pairs)) or fitted.pairs
    if missing := sorted(set(chosen) - set(fitted.pairs)):
        raise MappingError(f"mapping {name} has no map for {listed(missing)}.", hint=fitted.listed)
    maps = fitted.chosen(chosen)
    about = {
        **fitted.said(),
        "pairs": [list(pair) for pair in chosen],
        "held_out": [scores for scores in fitted.about.dump()["held_out"] if tuple(scores[:2]) in maps],
    }
    weights = (part for pair in sorted(maps) for part in _bytes_of_map(pair, maps[pair]))
    return ResolvedMapping(
        name=name, kind="pairs", maps=maps, digest=_digest(weights), about=about, notices=tuple(notices)
    )


def _load(mapping: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    if isinstance(mapping, str):
        try:
            return MAPPINGS.find(mapping), mapping
        except ValueError as error:
            raise MappingError(f"mapping: {error}.") from error
    if not isinstance(mapping, tuple):
        kind = "affine" if isinstance(mapping, Affine) else dump_mapping(mapping)["python"].rsplit(":", 1)[1]
        return mapping, kind
    key, item = mapping
    if key == "affine":
        return Affine.load(item), f"affine:{Path(item).name}"
    try:
        return import_function(item), item.split(":")[1]
    except ValueError as error:
        raise MappingError(
            f"mapping.function={error}.",
            hint="Write module:name, and run where Python finds the module (PYTHONPATH).",
        ) from error


def _check_shape(call: Any, name: str, source: Space, target: Space) -> None:
    states = torch.stack([torch.zeros(source.d_model), torch.ones(source.d_model)])
    if isinstance(call, torch.nn.Module):
        first = next(itertools.chain(call.parameters(), call.buffers()), states)
        states = states.to(first)
    expected = (2, target.d_model)
    try:
        with torch.no_grad():
            mapped = call(states)
    except Exception as error:
        raise MappingError(
            f"mapping {name} fails on states of shape {tuple(states.shape)}: {error}.",
            hint=f"It should map (n, {source.d_model}) to (n, {target.d_model}).",
        ) from error
    if not isinstance(mapped, torch.Tensor) or tuple(mapped.shape) != expected:
        shape = tuple(mapped.shape) if isinstance(mapped, torch.Tensor) else type(mapped).__name__
        raise MappingError(
            f"mapping {name} gives {shape} for states of shape {tuple(states.shape)}; should be {expected}.",
            hint=f"It maps {source.name} (d_model {source.d_model}) to {target.name} ({target.d_model}).",
        )


def _bytes_of(call: Any) -> Iterator[bytes]:
    """Yield the bytes of a module's weights, or of a function's code, closure and defaults."""
    if isinstance(call, torch.nn.Module):
        yield from (key.encode() + value_bytes(tensor) for key, tensor in sorted(call.state_dict().items()))
    elif hasattr(call, "__code__"):
        yield function_bytes(call)


def _bytes_of_map(pair: Pair, parts: Parts) -> Iterator[bytes]:
    """Yield the bytes of the tensors that map one pair of layers."""
    yield from (f"{name}{pair}".encode() + value_bytes(tensor) for name, tensor in parts.items())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
