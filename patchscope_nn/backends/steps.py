"""Runs a plan's steps one after the other, and yields the cells of each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch

from patchscope_nn.backends.places import Backend
from patchscope_nn.body.program import Work
from patchscope_nn.engines import Results
from patchscope_nn.errors import RunError
from patchscope_nn.lower import unpack
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, memory_reused
from patchscope_nn.plan import Plan, State, Step
from patchscope_nn.sweep import Cell


class PassTooLargeError(RunError):
    """A pass ran out of memory.

    Attributes:
        rows: The most cells that a pass of the step held.
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
    """Hears of a step while it runs, where it runs in this process. What it raises ends the run."""

    def read(self, count: int) -> None:
        """So many cells' prompts have been read."""

    def decoded(self, cell: int, ids: Sequence[int]) -> None:
        """A cell, by its number, has these tokens by now; decoded, and cut at the stop, they are its text."""


def run_steps(
    plan: Plan,
    *,
    source: Model,
    target: Model,
    mapping: ResolvedMapping,
    backend: Backend,
    listener: Listener | None = None,
) -> Iterator[Iterator[tuple[Cell, dict[str, Any]]]]:
    """Run a plan step by step.

    Args:
        plan: The plan.
        source: M.
        target: M*.
        mapping: f.
        backend: Where the contexts are opened.
        listener: Told what is read and decoded as it happens; nothing is heard from another process.

    Yields:
        For each step its cells and those they run for, with raw readouts; to be taken before the next step.

    Raises:
        PassTooLargeError: A pass ran out of memory; what was yielded is done, and can be planned around.
        RunError: A step gave another number of rows than it has cells.
    """
    reused = plan.optimisations.memory_reuse and not backend.remote and target.info.device == "cpu"
    with memory_reused() if reused else nullcontext():
        yield from _run_steps(
            plan, source, target, mapping, backend, listener=None if backend.remote else listener
        )


def _run_steps(
    plan: Plan,
    source: Model,
    target: Model,
    mapping: ResolvedMapping,
    backend: Backend,
    *,
    listener: Listener | None,
) -> Iterator[Iterator[tuple[Cell, dict[str, Any]]]]:
    states: dict[State, torch.Tensor] = {}
    prefix: tuple[tuple[int, ...], Any] = ((), None)
    for step in plan.steps():
        work = unpack(
            plan,
            step,
            source=source,
            target=target,
            mapping=mapping,
            states=states,
            prefix=prefix[1] if prefix[0] == step.prefix else None,
            keeps_prefix=not backend.remote,
        )
        if listener is not None:
            for one, passed in zip(step.targets, work["targets"], strict=True):
                cells = [step.cells[place] for place in one.cells]
                passed["readout"]["heard"] = _heard(plan, cells, passed["readout"], listener)
        with _memory_watched(step):
            results = backend.run(step.context, work, source=source, target=target)
        fresh = [state for one in step.sources for state in one.states]
        numbers = {state: place for place, state in enumerate([*step.carried, *fresh])}
        states.update({state: results["kept"][numbers[state]] for state in step.kept})
        for state in step.dropped:
            del states[state]
        if results["prefix"] is not None:
            prefix = step.prefix, results["prefix"]
        yield results_of(plan, step, results)


def _heard(
    plan: Plan, cells: Sequence[Cell], readout: Work, listener: Listener
) -> Callable[[list[int], list[int]], None]:
    """What a pass is to call: first with nothing, then at each step with rows and their tokens."""
    numbers = [(cell.number, *plan.copies.get(cell.number, ())) for cell in cells]
    ends = set(readout["eos"])
    texts: list[list[int]] = [[] for _ in cells]

    def heard(rows: list[int], ids: list[int]) -> None:
        if not rows:
            listener.read(sum(map(len, numbers)))
        for row, token in zip(rows, ids, strict=True):
            if token not in ends:
                texts[row].append(token)
                for number in numbers[row]:
                    listener.decoded(number, texts[row])

    return heard


def results_of(plan: Plan, step: Step, results: Results) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """The cells of a step, and those it ran for, each with its readout."""
    for one, rows in zip(step.targets, results["passes"], strict=True):
        if len(rows) != len(one.cells):
            raise RunError(f"a pass of {len(one.cells)} cells gave {len(rows)} results.")
        for place, row in zip(one.cells, rows, strict=True):
            cell = step.cells[place]
            yield cell, row
            for number in plan.copies.get(cell.number, ()):
                yield plan.sweep.cells[number], row


@contextmanager
def _memory_watched(step: Step) -> Iterator[None]:
    """Tell running out of memory from other failures, whatever wraps it, and let go of what was held."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows = max(len(one.cells) for one in step.targets)
    else:
        return
    # Only here are the failed pass's tensors out of reach: while an error is handled, its frames hold them.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise PassTooLargeError(rows)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no more memory."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in said for text in ("out of memory", "can't allocate memory", "not enough memory")
    )
