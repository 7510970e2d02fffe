"""The forms of the maps that are trained through a text; each starts as the identity."""

from __future__ import annotations

import torch


class Form(torch.nn.Module):
    """A map as it is trained, of states (..., d_model); subclasses are made as `Form(d_model, rank)`."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the map as it is saved, by name."""
        return {name: weight.detach().clone() for name, weight in self.named_parameters()}


class Scale(Form):
    """f(h) = a h."""

    def __init__(self, d_model: int, rank: int) -> None:  # noqa: ARG002 (all forms are made alike)
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states."""
        return self.scale * states


class ScalarAffine(Scale):
    """f(h) = a h + b."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__(d_model, rank)
        self.bias = torch.nn.Parameter(torch.zeros(d_model))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states."""
        return super().forward(states) + self.bias


class LowRank(Form):
    """f(h) = h + U V h + b; U V has a given rank, U is zero at first, and V random."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(rank, d_model) / d_model**0.5)
        self.up = torch.nn.Parameter(torch.zeros(d_model, rank))
        self.bias = torch.nn.Parameter(torch.zeros(d_model))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states."""
        return states + states @ self.down.T @ self.up.T + self.bias

    def tensors(self) -> dict[str, torch.Tensor]:
        """As in `Form`, with I + U V as one matrix."""
        weight = torch.eye(len(self.bias)).to(self.bias) + self.up @ self.down
        return {"weight": weight.detach(), "bias": self.bias.detach().clone()}


class Affine(Form):
    """f(h) = W h + b."""

    def __init__(self, d_model: int, rank: int) -> None:  # noqa: ARG002 (all forms are made alike)
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(d_model))
        self.bias = torch.nn.Parameter(torch.zeros(d_model))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states."""
        return torch.nn.functional.linear(states, self.weight, self.bias)
