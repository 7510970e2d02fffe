"""Gradient descent through a frozen model: one loop for every kind, stopped by data it is not trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field

from patchscope_nn.fitting.reporting import Progress
from patchscope_nn.spec import Spec

#: How many times the maps are scored on the part that decides when to stop.
_CHECKS = 10
#: The largest norm of the gradient of one map; larger gradients are clipped.
_CLIP = 1.0

Key = TypeVar("Key")


class Training(Spec):
    """How something is trained: by Adam, whose learning rate falls linearly to zero.

    The descriptions of the fields are the help texts of the command line.
    """

    steps: Annotated[int, Field(ge=1)] = 300
    """Steps of the optimiser."""
    batch: Annotated[int, Field(ge=1)] = 64
    """What a step sees: tokens, or rows."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Adam's rate at first."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share of the data that it is scored on, and nothing else."""
    stopping: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share that chooses the best step; 0 keeps the last."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides what is held out, the order of the data, random starts."""

    @property
    def shares(self) -> dict[str, Any]:
        """The fields that decide how data is split, as `split_items` takes them."""
        return self.model_dump(include={"held_out", "stopping", "seed"})


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
    best = {key: (float("inf"), 0, copy.deepcopy(module.state_dict())) for key, module in maps.items()}

    def keep_best(step: int) -> None:
        with torch.no_grad():
            scores = score() if training.stopping else dict.fromkeys(maps, float(-step))
        for key, loss in scores.items():
            if loss < best[key][0]:
                best[key] = (loss, step, copy.deepcopy(maps[key].state_dict()))

    keep_best(0)
    for step in range(1, training.steps + 1):
        optimiser.zero_grad()
        for loss in losses():
            loss.backward()
        for module in maps.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), _CLIP)
        optimiser.step()
        rate.step()
        if step % max(1, training.steps // _CHECKS) == 0 or step == training.steps:
            keep_best(step)
        if progress is not None:
            progress(step, training.steps)
    for key, (_, _, weights) in best.items():
        maps[key].load_state_dict(weights)
    return {key: step for key, (_, step, _) in best.items()}
