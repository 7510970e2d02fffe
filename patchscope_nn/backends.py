"""Backends: where a step's context is opened. One method, so that a test can stand in for a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from patchscope_nn.cells import Cell
from patchscope_nn.emit import Results, emit
from patchscope_nn.errors import InputError, RunError
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model
from patchscope_nn.plan import Context, Plan, State
from patchscope_nn.unpack import Work, unpack


class Backend(Protocol):
    """Runs one step."""

    @property
    def name(self) -> str:
        """How manifests call it."""

    @property
    def remote(self) -> bool:
        """Whether each request runs one model only."""

    def run(self, context: Context, work: Work, *, source: Model, target: Model) -> Results:
        """Open the context, run the step, and give back what `emit` gives."""


@dataclass(frozen=True)
class Local:
    """The models are in this process."""

    name: str = "local"
    remote: bool = False

    def run(self, context: Context, work: Work, *, source: Model, target: Model) -> Results:
        """Run a step in this process."""
        return emit(context, work, source=source.traced, target=target.traced)


@dataclass(frozen=True)
class Rehearsal:
    """nnsight's rehearsal of a remote run: the request is serialised, read back, and run in this process.

    Passing it is necessary for a remote run, not sufficient.
    """

    name: str = "rehearsal"
    remote: bool = True

    def run(self, context: Context, work: Work, *, source: Model, target: Model) -> Results:
        """Take a step through nnsight's serialisation."""
        return emit(context, work, source=source.traced, target=target.traced, remote="local")


def backend_for(remote: bool | str) -> Backend:  # noqa: FBT001 (the value of an option, as users give it)
    """The backend an option names.

    Args:
        remote: False for this process, `local` for the rehearsal.

    Raises:
        InputError: Any other value.
    """
    if remote is False:
        return Local()
    if remote == "local":
        return Rehearsal()
    raise InputError(
        f"remote={remote!r} is not available in this version.",
        hint="Leave remote out to run in this process, or use remote='local' to rehearse a remote run.",
    )


def execute(
    plan: Plan, *, source: Model, target: Model, mapping: ResolvedMapping, backend: Backend
) -> Iterator[list[tuple[Cell, dict[str, Any]]]]:
    """Run a plan step by step.

    Args:
        plan: The plan.
        source: M.
        target: M*.
        mapping: f.
        backend: Where the contexts are opened.

    Yields:
        For each step its cells, in the sweep's order, each with its raw readout.

    Raises:
        RunError: A step gave another number of rows than it has cells.
    """
    last_use = {state: number for number, step in enumerate(plan.steps) for state in step.carried}
    states: dict[State, torch.Tensor] = {}
    for number, step in enumerate(plan.steps):
        work = unpack(plan, step, source=source, target=target, mapping=mapping, states=states)
        results = backend.run(step.context, work, source=source, target=target)
        fresh = [state for one in step.sources for state in one.states]
        numbers = {state: place for place, state in enumerate([*step.carried, *fresh])}
        states.update({state: results["kept"][numbers[state]] for state in step.kept})
        states = {state: value for state, value in states.items() if last_use.get(state, -1) > number}
        done: list[tuple[int, dict[str, Any]]] = []
        for one, rows in zip(step.targets, results["passes"], strict=True):
            if len(rows) != len(one.cells):
                raise RunError(f"a pass of {len(one.cells)} cells gave {len(rows)} results.")
            for cell, row in zip(one.cells, rows, strict=True):
                done.extend((place, row) for place in (cell, *plan.copies.get(cell, ())))
        yield [(plan.cells[cell], row) for cell, row in sorted(done, key=lambda pair: pair[0])]
