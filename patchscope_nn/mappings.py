"""Mappings f: from the source model's hidden space to the target's.

A mapping is resolved, before any context opens, to a `ResolvedMapping`: a kind and tensors, which is all
that travels into one. `apply_mapping` is the one function that runs there.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from patchscope_nn.errors import MappingError
from patchscope_nn.models import ModelInfo
from patchscope_nn.spec import NAMED_MAPPINGS, dump_mapping


class Affine(torch.nn.Module):
    """f(h) = W h + b, with weights that are given.

    Args:
        weight: W, (d_model of the target, d_model of the source).
        bias: b, (d_model of the target,); None for zero.

    Raises:
        MappingError: The shapes do not fit each other.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):  # noqa: PLR2004 (a matrix)
            raise MappingError(
                f"an affine mapping has a weight of shape (d_out, d_in) and a bias of shape (d_out,); given "
                f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}."
            )
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states.

        Args:
            states: (..., d_in).

        Returns:
            (..., d_out).
        """
        return torch.nn.functional.linear(states, self.weight, self.bias)

    @classmethod
    def load(cls, file: str | Path) -> Affine:
        """Read `weight` and, where there is one, `bias` from a safetensors file.

        Raises:
            MappingError: The file cannot be read or holds no `weight`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise MappingError(
                f"mapping.affine={str(file)!r} cannot be read: {error}.", hint="Give a safetensors file."
            ) from error
        if "weight" not in tensors or set(tensors) - {"weight", "bias"}:
            raise MappingError(
                f"mapping.affine={str(file)!r} holds {sorted(tensors)}; it should hold 'weight' "
                "(d_out, d_in) and may hold 'bias' (d_out,)."
            )
        return cls(tensors["weight"], tensors.get("bias"))


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedMapping:
    """A mapping ready to travel into a context.

    Attributes:
        name: How tables and manifests call it.
        kind: `identity`, `target_norm` or `call`.
        call: For `call`, a function from (..., d_model) to (..., d_model of the target).
        digest: Hex digest of its weights; empty where it has none.
    """

    name: str
    kind: str
    call: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, repr=False)
    digest: str = ""


def resolve_mapping(mapping: Any, *, source: ModelInfo, target: ModelInfo) -> ResolvedMapping:
    """Load a mapping and check, on one state of zeros and one of ones, that it fits between two models.

    Args:
        mapping: The `mapping` of a Patchscope.
        source: The model whose states it takes.
        target: The model whose hidden space it maps to.

    Returns:
        The mapping, resolved.

    Raises:
        MappingError: It cannot be loaded, or does not take (n, d_model) to (n, d_model of the target).
    """
    if mapping in NAMED_MAPPINGS:
        if source.d_model != target.d_model:
            raise MappingError(
                f"mapping: {mapping} needs hidden states of one size; the source's have {source.d_model} "
                f"({source.name}), the target's {target.d_model} ({target.name}).",
                hint="Give an affine mapping: {affine: weights.safetensors}.",
            )
        return ResolvedMapping(name=mapping, kind=mapping)
    call, name = _load(mapping)
    _check_shape(call, name, source=source, target=target)
    return ResolvedMapping(name=name, kind="call", call=call, digest=_digest(call))


def _load(mapping: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    if not isinstance(mapping, tuple):
        kind = "affine" if isinstance(mapping, Affine) else dump_mapping(mapping)["python"].rsplit(":", 1)[1]
        return mapping, kind
    key, item = mapping
    if key == "affine":
        return Affine.load(item), f"affine:{Path(item).name}"
    module, name = item.split(":")
    try:
        call = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MappingError(
            f"mapping.function={item!r} cannot be imported: {error}.",
            hint="Write module:name, and run where Python finds the module (PYTHONPATH).",
        ) from error
    return call, name


def _check_shape(call: Any, name: str, *, source: ModelInfo, target: ModelInfo) -> None:
    states = torch.stack([torch.zeros(source.d_model), torch.ones(source.d_model)])
    if isinstance(call, torch.nn.Module) and (first := next(_tensors(call), None)) is not None:
        states = states.to(first)
    expected = (2, target.d_model)
    try:
        with torch.no_grad():
            given = call(states)
    except Exception as error:
        raise MappingError(
            f"mapping {name} fails on states of shape {tuple(states.shape)}: {error}.",
            hint=f"It should map (n, {source.d_model}) to (n, {target.d_model}).",
        ) from error
    if not isinstance(given, torch.Tensor) or tuple(given.shape) != expected:
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise MappingError(
            f"mapping {name} gives {shape} for states of shape {tuple(states.shape)}; should be {expected}.",
            hint=f"It maps {source.name} (d_model {source.d_model}) to {target.name} ({target.d_model}).",
        )


def _tensors(module: torch.nn.Module) -> Any:
    yield from module.parameters()
    yield from module.buffers()


def _digest(call: Any) -> str:
    """What tells mappings of one name apart: a module's weights; a function's code, closure and defaults."""
    found = hashlib.sha256()
    if isinstance(call, torch.nn.Module):
        for key, tensor in sorted(call.state_dict().items()):
            found.update(key.encode() + _said(tensor))
    elif hasattr(call, "__code__"):
        closed = [cell.cell_contents for cell in call.__closure__ or ()]
        for part in (call.__code__, *closed, *(call.__defaults__ or ())):
            found.update(_said(part))
    return found.hexdigest()[:16]


def _said(part: Any) -> bytes:
    """A value as bytes that are the same in every process; empty for an object that has none."""
    if isinstance(part, torch.Tensor):
        return part.detach().float().cpu().contiguous().numpy().tobytes()
    if isinstance(part, CodeType):
        return part.co_code + repr(part.co_names).encode() + b"".join(map(_said, part.co_consts))
    return repr(part).encode() if isinstance(part, int | float | str | bytes | None) else b""


def apply_mapping(
    kind: str, call: Callable[[torch.Tensor], torch.Tensor] | None, states: torch.Tensor, clean: torch.Tensor
) -> torch.Tensor:
    """Map states, inside a context.

    Args:
        kind: The kind of a `ResolvedMapping`.
        call: Its function.
        states: (n, d_model) states of the source.
        clean: (n, d_model of the target) the states they will replace.

    Returns:
        (n, d_model of the target), in the dtype and on the device of `clean`.
    """
    if kind == "call" and call is not None:
        if isinstance(call, torch.nn.Module):
            for tensor in [*call.parameters(), *call.buffers()][:1]:
                states = states.to(tensor)
        return call(states).to(clean)
    states = states.to(clean)
    if kind == "target_norm":
        return states * (clean.norm(dim=-1, keepdim=True) / states.norm(dim=-1, keepdim=True))
    return states
