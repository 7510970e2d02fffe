"""Gradient descent through a frozen model: one loop for all that is trained, and data apart to stop it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Generic, TypeVar

import torch
from pydantic import Field

from patchscope_nn.fitting.trained.outcome import Progress
from patchscope_nn.spec import Spec

#: How many times the part that says when to stop is looked at.
_CHECKS = 10
#: The largest norm of the gradient of one map.
_CLIP = 1.0

Key = TypeVar("Key")


class Training(Spec):
    """How something is trained.

    Attributes:
        steps: Steps of the optimiser (Adam); its rate falls to zero in a line.
        batch: What a step sees: tokens for a lens, rows for what is trained through a text.
        learning_rate: The rate at first.
        held_out: The share of the data that the reported numbers are computed on, and nothing else.
        stopping: The share that chooses, for each map, the best of the steps; 0 keeps the last.
        seed: Decides what is held out, the order of the data, and random starts.
    """

    steps: Annotated[int, Field(ge=1)] = 300
    batch: Annotated[int, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    stopping: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seed: Annotated[int, Field(ge=0)] = 0


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
        maps: What is trained; none shares a parameter with another.
        losses: Gives the losses of one step, each to be differentiated before the next is asked for.
        score: What each map loses on the part that says when to stop; not called where that is empty.
        training: How.
        progress: Called with (steps done, steps in all).

    Returns:
        For each map, the step it was left at; 0 is its start.
    """
    optimiser = torch.optim.Adam(
        (weight for one in maps.values() for weight in one.parameters()), lr=training.learning_rate
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / training.steps)
    best = _Best(maps, score if training.stopping else None)
    best.look(0)
    for step in range(1, training.steps + 1):
        optimiser.zero_grad()
        for loss in losses():
            loss.backward()
        for one in maps.values():
            torch.nn.utils.clip_grad_norm_(one.parameters(), _CLIP)
        optimiser.step()
        rate.step()
        if step % max(1, training.steps // _CHECKS) == 0 or step == training.steps:
            best.look(step)
        if progress is not None:
            progress(step, training.steps)
    return best.restore()


class _Best(Generic[Key]):
    """The maps as they were when they scored best; without a score, as they were last."""

    def __init__(
        self, maps: Mapping[Key, torch.nn.Module], score: Callable[[], Mapping[Key, float]] | None
    ) -> None:
        self.maps, self.score = maps, score
        self.lost = dict.fromkeys(maps, float("inf"))
        self.found: dict[Key, tuple[int, dict[str, torch.Tensor]]] = {}

    def look(self, step: int) -> None:
        with torch.no_grad():
            lost = dict.fromkeys(self.maps, 0.0) if self.score is None else self.score()
        for key, one in lost.items():
            if self.score is None or one < self.lost[key]:
                self.lost[key] = one
                self.found[key] = (step, copy.deepcopy(self.maps[key].state_dict()))

    def restore(self) -> dict[Key, int]:
        for key, (_, state) in self.found.items():
            self.maps[key].load_state_dict(state)
        return {key: step for key, (step, _) in self.found.items()}
