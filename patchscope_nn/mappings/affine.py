"""One affine map with given weights, the same for all layers."""

from __future__ import annotations

from pathlib import Path

import torch

from patchscope_nn._util.arguments import checked_class
from patchscope_nn.errors import MappingError


@checked_class
class Affine(torch.nn.Module):
    """f(h) = W h + b, with given weights.

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
        """Map states, (..., d_in), to (..., d_out)."""
        return torch.nn.functional.linear(states, self.weight, self.bias)

    @classmethod
    def load(cls, file: str | Path) -> Affine:
        """Read `weight` and, if the file has it, `bias` from a safetensors file.

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
