"""Gradient descent through a frozen model: one loop for every kind, stopped by data it is not trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Generic, TypeVar

import torch
from pydantic import Field

from patchscope_nn.fitting.trained.outcome import Progress
from patchscope_nn.spec import Spec

#: How many times the maps are scored on the part that decides when to stop.
_CHECKS = 10
#: The largest norm of the gradient of one map; larger gradients are clipped.
_CLIP = 1.0

Key = TypeVar("Key")


class Training(Spec):
    """How something is trained."""

    steps: Annotated[int, Field(ge=1)] = 300
    """Steps of the optimiser (Adam); its learning rate falls linearly to zero."""
    batch: Annotated[int, Field(ge=1)] = 64
    """How many items a step sees: tokens for a lens, rows for maps trained through a text."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """The initial learning rate."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share of the data that scores are computed on, and nothing else."""
    stopping: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share that chooses the best step for each map; 0 keeps the last step."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides what is held out, the order of the data, and random starts."""


def descend(
    maps: Mapping[Key, torch.nn.Module],
    *,
    losses: Callable[[], Iterable[torch.Tensor]],
    score: Callable[[], Mapping[Key, float]],
    training: Training,
    progress: Progress | None = None,
) -> dict[Key, int]:
    """Train some maps at once, and leave each as it was when it scored best.

    Args:
        maps: The maps to train, which share no parameters.
        losses: Yields the losses of one step; each is differentiated before the next is computed.
        score: Gives the loss of each map on the part that decides when to stop; not called if that is empty.
        training: How to train.
        progress: Called with (steps done, steps in total).

    Returns:
        For each map, the step whose weights it has; 0 is its start.
    """
    optimiser = torch.optim.Adam(
        (weight for module in maps.values() for weight in module.parameters()), lr=training.learning_rate
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / training.steps)
    best = _Best(maps, score if training.stopping else None)
    best.update(0)
    for step in range(1, training.steps + 1):
        optimiser.zero_grad()
        for loss in losses():
            loss.backward()
        for module in maps.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), _CLIP)
        optimiser.step()
        rate.step()
        if step % max(1, training.steps // _CHECKS) == 0 or step == training.steps:
            best.update(step)
        if progress is not None:
            progress(step, training.steps)
    return best.restore()


class _Best(Generic[Key]):
    """Keeps the weights with which each map scored best; without a score, the latest weights."""

    def __init__(
        self, maps: Mapping[Key, torch.nn.Module], score: Callable[[], Mapping[Key, float]] | None
    ) -> None:
        self.maps, self.score = maps, score
        self.losses = dict.fromkeys(maps, float("inf"))
        self.kept: dict[Key, tuple[int, dict[str, torch.Tensor]]] = {}

    def update(self, step: int) -> None:
        with torch.no_grad():
            losses = dict.fromkeys(self.maps, 0.0) if self.score is None else self.score()
        for key, loss in losses.items():
            if self.score is None or loss < self.losses[key]:
                self.losses[key] = loss
                self.kept[key] = (step, copy.deepcopy(self.maps[key].state_dict()))

    def restore(self) -> dict[Key, int]:
        for key, (_, state) in self.kept.items():
            self.maps[key].load_state_dict(state)
        return {key: step for key, (step, _) in self.kept.items()}
