"""Runs a plan's steps one after the other, and yields the cells of each."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch

from patchscope_nn.backends.places import Backend
from patchscope_nn.body.contexts import Hear
from patchscope_nn.body.program import Results, StepProgram
from patchscope_nn.errors import RunError
from patchscope_nn.lower import lower
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, memory_reused
from patchscope_nn.plan import Plan, State, Step
from patchscope_nn.sweep import Cell


class PassTooLargeError(RunError):
    """A pass ran out of memory.

    Attributes:
        rows: How many cells the largest pass of the step had.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        super().__init__(
            "the device ran out of memory on a pass of one cell."
            if rows == 1
            else f"out of memory at {rows} rows.",
            hint="Shorten the prompts, or load the model smaller or elsewhere (--dtype, --device-map).",
        )


class Listener(Protocol):
    """Follows a step while it runs in this process. An exception that it raises ends the run."""

    def read(self, count: int) -> None:
        """Called when the prompts of `count` more cells have been read."""

    def decoded(self, cell: int, ids: Sequence[int]) -> None:
        """Called with a cell's number and its tokens so far, after each new token.

        As text, cut at the stop string, they are the cell's text so far.
        """


def run_steps(
    plan: Plan,
    *,
    source: Model,
    target: Model,
    mapping: ResolvedMapping,
    backend: Backend,
    listener: Listener | None = None,
) -> Iterator[Iterator[tuple[Cell, dict[str, Any]]]]:
    """Run a plan step by step. The listener hears only models that run in this process.

    Yields:
        For each step, an iterator over its cells and their copies, with raw readouts. Exhaust it before you
        take the next one.

    Raises:
        PassTooLargeError: A pass ran out of memory. The cells that were yielded are done; the caller can plan
            the others again.
        RunError: A step returned a different number of rows than it has cells.
    """
    states: dict[State, torch.Tensor] = {}
    prefix: tuple[tuple[int, ...], Any] = ((), None)
    reused = plan.optimisations.memory_reuse and not backend.remote and target.info.device == "cpu"
    with memory_reused() if reused else nullcontext():
        for step in plan.steps():
            program = lower(
                plan,
                step,
                source=source,
                target=target,
                mapping=mapping,
                states=states,
                prefix=prefix[1] if prefix[0] == step.prefix else None,
                keeps_prefix=not backend.remote,
            )
            hear = [] if listener is None or backend.remote else [*_hear(plan, step, program, listener)]
            with _memory_watched(step):
                results = backend.run(step.context, program, source=source, target=target, hear=hear)
            states.update({state: results["kept"][step.numbers[state]] for state in step.kept})
            for state in step.dropped:
                del states[state]
            if results["prefix"] is not None:
                prefix = step.prefix, results["prefix"]
            yield results_of(plan, step, results)


def _hear(plan: Plan, step: Step, program: StepProgram, listener: Listener) -> Iterator[Hear]:
    """Yield, for each target pass, a function that tells the listener about its cells."""
    for target_pass, target in zip(step.targets, program["targets"], strict=True):
        cells = [step.cells[index] for index in target_pass.cells]
        yield _hear_pass(plan, cells, set(target["readout"].get("eos", ())), listener)


def _hear_pass(plan: Plan, cells: Sequence[Cell], ends: set[int], listener: Listener) -> Hear:
    """Return the function for one target pass (see `body.contexts.Hear`)."""
    numbers = [(cell.number, *plan.copies.get(cell.number, ())) for cell in cells]
    texts: list[list[int]] = [[] for _ in cells]

    def hear(rows: list[int], ids: list[int]) -> None:
        if not rows:
            listener.read(sum(map(len, numbers)))
        for row, token in zip(rows, ids, strict=True):
            if token not in ends:
                texts[row].append(token)
                for number in numbers[row]:
                    listener.decoded(number, texts[row])

    return hear


def results_of(plan: Plan, step: Step, results: Results) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield the cells of a step and their copies, each with its readout."""
    for target, rows in zip(step.targets, results["passes"], strict=True):
        if len(rows) != len(target.cells):
            raise RunError(f"a pass of {len(target.cells)} cells returned {len(rows)} results.")
        for index, row in zip(target.cells, rows, strict=True):
            cell = step.cells[index]
            yield cell, row
            for number in plan.copies.get(cell.number, ()):
                yield plan.sweep.cells[number], row


@contextmanager
def _memory_watched(step: Step) -> Iterator[None]:
    """Turn any error that means out of memory into `PassTooLargeError`, and free the memory of the pass."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows = max(len(target.cells) for target in step.targets)
    else:
        return
    # Not inside `except`: there, the frames of the error still hold the tensors of the failed pass.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise PassTooLargeError(rows)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device, or the machine, is out of memory."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in message for text in ("out of memory", "can't allocate memory", "not enough memory")
    )
