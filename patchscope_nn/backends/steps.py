"""Runs a plan's steps one after the other, and yields the cells of each."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from patchscope_nn._util.ragged import Ints, ranges
from patchscope_nn.backends.places import Backend
from patchscope_nn.body.contexts import Hear
from patchscope_nn.body.program import Results, StepProgram
from patchscope_nn.errors import RunError
from patchscope_nn.lower import lower
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, memory_reused
from patchscope_nn.plan import Plan, Step
from patchscope_nn.sweep import Cell, Flags, Sweep


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
    thread: Executor | None = None,
) -> Iterator[Iterator[PassResult]]:
    """Run a plan step by step. The listener hears only models that run in this process.

    If there is a `thread`, it prepares each step while the step before runs. Steps run in the calling thread.

    Yields:
        For each step, an iterator over the results of its passes. Exhaust it before you take the next one.

    Raises:
        PassTooLargeError: A pass ran out of memory. The cells that were yielded are done; the caller can plan
            the others again.
        RunError: A step returned a different number of rows than it has cells.
    """
    held = HeldStates(plan.sweep)
    prefix: tuple[tuple[int, ...], Any] = ((), None)
    reused = plan.optimisations.memory_reuse and not backend.remote and target.info.device == "cpu"
    with memory_reused() if reused else nullcontext():
        lowering = {"source": source, "target": target, "mapping": mapping}
        for step, program in _lowered(plan, thread, keeps_prefix=not backend.remote, **lowering):
            given, program["given_finals"] = held.take(step.carried)
            program["given"] = given if program["given"] is None else program["given"]
            if program["prefix"] is not None and prefix[0] == step.prefix:
                program["prefix"]["known"] = prefix[1]
            hear = [] if listener is None or backend.remote else [*_hear(plan, step, program, listener)]
            with _memory_watched(plan, step):
                results = backend.run(step.context, program, source=source, target=target, hear=hear)
            held.add(step.kept, results["kept"], results["kept_finals"])
            held.drop(step.dropped)
            if results["prefix"] is not None:
                prefix = step.prefix, results["prefix"]
            yield results_of(plan, step, results)


def _lowered(plan: Plan, thread: Executor | None, **lowering: Any) -> Iterator[tuple[Step, StepProgram]]:
    """Yield the steps of a plan with their programs, which lack what earlier steps hand on.

    A thread prepares the next step while the caller runs the one that was yielded.
    """
    steps = plan.steps()

    def following() -> tuple[Step, StepProgram] | None:
        step = next(steps, None)
        return None if step is None else (step, lower(plan, step, **lowering))

    if thread is None:
        yield from iter(following, None)
        return
    coming = thread.submit(following)
    while (lowered := coming.result()) is not None:
        coming = thread.submit(following)
        yield lowered


def _hear(plan: Plan, step: Step, program: StepProgram, listener: Listener) -> Iterator[Hear]:
    """Yield, for each target pass, a function that tells the listener about its cells."""
    for target_pass, target in zip(step.targets, program["targets"], strict=True):
        numbers = step.cells.number[target_pass.cells]
        yield _hear_pass(plan, numbers, set(target["readout"].get("eos", ())), listener)


def _hear_pass(plan: Plan, cells: Ints, ends: set[int], listener: Listener) -> Hear:
    """Return the function for one target pass (see `body.contexts.Hear`)."""
    numbers = [[number] for number in cells.tolist()]
    for number, index in zip(*plan.copies(cells), strict=True):
        numbers[index].append(int(number))
    texts: list[list[int]] = [[] for _ in numbers]

    def hear(rows: list[int], ids: list[int]) -> None:
        if not rows:
            listener.read(sum(map(len, numbers)))
        for row, token in zip(rows, ids, strict=True):
            if token not in ends:
                texts[row].append(token)
                for number in numbers[row]:
                    listener.decoded(number, texts[row])

    return hear


class PassResult(NamedTuple):
    """What a target pass has returned.

    Attributes:
        cells: The numbers of its cells, and of their copies, in ascending order.
        rows: For each of these, its row of the columns.
        columns: The raw readouts: tensors or lists with an item for each cell of the pass.
    """

    cells: Ints
    rows: Ints
    columns: dict[str, Any]

    @property
    def n_rows(self) -> int:
        """The number of rows of the columns."""
        return len(next(iter(self.columns.values())))

    @property
    def finite(self) -> Flags:
        """True for the cells whose numbers are finite."""
        reasons = self.columns.get("not_finite")
        if reasons is None:
            return np.ones(len(self.cells), bool)
        return np.array([reason is None for reason in reasons])[self.rows]

    def take(self, kept: Flags) -> PassResult:
        """Return the result with some of its cells."""
        return PassResult(self.cells[kept], self.rows[kept], self.columns)

    def raw(self, sweep: Sweep) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Yield each cell with its raw readout as plain values, which is slow for many cells."""
        listed = {
            name: [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]
            for name, values in self.columns.items()
        }
        for cell, row in zip(sweep.cells.block(self.cells), self.rows.tolist(), strict=True):
            readout = {name: values[row] for name, values in listed.items()}
            if readout.get("not_finite", "") is None:
                del readout["not_finite"]
            yield cell, readout


def results_of(plan: Plan, step: Step, results: Results) -> Iterator[PassResult]:
    """Yield the results of the passes of a step."""
    for target, columns in zip(step.targets, results["passes"], strict=True):
        cells = step.cells.number[target.cells]
        copies, index = plan.copies(cells)
        yield pass_result(columns, np.append(cells, copies), np.append(np.arange(len(cells)), index))


def pass_result(columns: dict[str, Any], cells: Ints, rows: Ints) -> PassResult:
    """Return the result of a pass.

    Raises:
        RunError: A column does not have an item for each cell of the pass.
    """
    count = int(rows.max(initial=-1)) + 1
    for name, values in columns.items():
        if len(values) != count:
            raise RunError(f"a pass of {count} cells returned {len(values)} values of {name}.")
    order = np.argsort(cells)
    return PassResult(cells[order], rows[order], columns)


class HeldStates:
    """States that steps hand on to later ones.

    Args:
        sweep: The sweep.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._hidden, self._finals = _Table(), _Table()

    def add(self, states: Ints, hidden: torch.Tensor | None, finals: torch.Tensor | None) -> None:
        """Hold states, given with the rows of all hidden states and of all distributions among them."""
        final = self._sweep.states.is_final(states)
        origins = self._sweep.states.origin(states[~final])
        self._hidden.add(states[~final], self._sweep.cells.origin_positions.counts[origins], hidden)
        self._finals.add(states[final], np.ones(int(final.sum()), np.int64), finals)

    def take(self, states: Ints) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the rows of the hidden states, and of the distributions; None for none."""
        final = self._sweep.states.is_final(states)
        return self._hidden.take(states[~final]), self._finals.take(states[final])

    def drop(self, states: Ints) -> None:
        """Forget states."""
        self._hidden.drop(states)
        self._finals.drop(states)


class _Table:
    """Tensors of several rows each, in one tensor."""

    def __init__(self) -> None:
        self._states, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._rows: torch.Tensor | None = None

    def add(self, states: Ints, counts: Ints, rows: torch.Tensor | None) -> None:
        if not len(states) or rows is None:
            return
        self._states, self._counts = np.append(self._states, states), np.append(self._counts, counts)
        self._rows = rows if self._rows is None else torch.cat([self._rows, rows.to(self._rows.device)])

    def take(self, states: Ints) -> torch.Tensor | None:
        if not len(states) or self._rows is None:
            return None
        order = np.argsort(self._states)
        place = order[np.searchsorted(self._states, states, sorter=order)]
        starts = np.cumsum(self._counts) - self._counts
        rows = torch.from_numpy(ranges(starts[place], self._counts[place]))
        return self._rows[rows.to(self._rows.device)]

    def drop(self, states: Ints) -> None:
        left = ~np.isin(self._states, states)
        if self._rows is not None and not left.all():
            kept = torch.from_numpy(np.repeat(left, self._counts))
            self._rows = self._rows[kept.to(self._rows.device)]
            self._states, self._counts = self._states[left], self._counts[left]


@contextmanager
def _memory_watched(plan: Plan, step: Step) -> Iterator[None]:
    """Turn any error that means out of memory into `PassTooLargeError`, and free the memory of the pass."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        together = plan.sweep.target.supports("requests")
        rows = len(step.cells) if together else max(len(target.cells) for target in step.targets)
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
