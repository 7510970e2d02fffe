"""The forms of the maps that are trained through a text; each starts as the identity."""

from __future__ import annotations

from abc import abstractmethod

import torch


class Form(torch.nn.Module):
    """A map as it is trained.

    Args:
        d_model: The size of a state.
        rank: The rank of U V, for `LowRank`.
    """

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.d_model, self.rank = d_model, rank

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the map as it is saved, by name."""


class Scale(Form):
    """f(h) = a h."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__(d_model, rank)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (..., d_model) -> (..., d_model)."""
        return self.scale * states

    def tensors(self) -> dict[str, torch.Tensor]:
        """As in `Form`."""
        return {"scale": self.scale.detach().clone()}


class ScalarAffine(Form):
    """f(h) = a h + b."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__(d_model, rank)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.bias = torch.nn.Parameter(torch.zeros(d_model))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (..., d_model) -> (..., d_model)."""
        return self.scale * states + self.bias

    def tensors(self) -> dict[str, torch.Tensor]:
        """As in `Form`."""
        return {"scale": self.scale.detach().clone(), "bias": self.bias.detach().clone()}


class LowRank(Form):
    """f(h) = h + U V h + b; U is zero at first, and V random."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__(d_model, rank)
        self.down = torch.nn.Parameter(torch.randn(rank, d_model) / d_model**0.5)
        self.up = torch.nn.Parameter(torch.zeros(d_model, rank))
        self.bias = torch.nn.Parameter(torch.zeros(d_model))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (..., d_model) -> (..., d_model)."""
        return states + states @ self.down.T @ self.up.T + self.bias

    def tensors(self) -> dict[str, torch.Tensor]:
        """As in `Form`."""
        weight = torch.eye(len(self.bias)).to(self.bias) + self.up @ self.down
        return {"weight": weight.detach(), "bias": self.bias.detach().clone()}


class Affine(Form):
    """f(h) = W h + b."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__(d_model, rank)
        self.weight = torch.nn.Parameter(torch.eye(d_model))
        self.bias = torch.nn.Parameter(torch.zeros(d_model))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (..., d_model) -> (..., d_model)."""
        return torch.nn.functional.linear(states, self.weight, self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As in `Form`."""
        return {"weight": self.weight.detach().clone(), "bias": self.bias.detach().clone()}
