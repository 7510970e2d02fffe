"""Backends: where a step's context is opened. One method, so that a test can stand in for a cluster."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from patchscope_nn import jobs
from patchscope_nn.bridge import in_place_of, source_half, target_half
from patchscope_nn.cells import Cell
from patchscope_nn.emit import Results, emit
from patchscope_nn.errors import RunError
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, memory_reused
from patchscope_nn.plan import Context, Plan, State, Step
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
        if context == "bridged":
            return Bridged(self, self).run(context, work, source=source, target=target)
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
        from nnsight.intervention.backends.local import LocalSimulationBackend

        if context == "bridged":
            return Bridged(self, self).run(context, work, source=source, target=target)
        backend = LocalSimulationBackend(target.traced)
        return emit(context, work, source=source.traced, target=target.traced, backend=backend)


@dataclass(frozen=True)
class Ndif:
    """A model on an NDIF server; each step is a job.

    Attributes:
        host: The server's URL.
    """

    host: str
    name: str = "ndif"
    remote: bool = True

    def run(self, context: Context, work: Work, *, source: Model, target: Model) -> Results:
        """Send a step as a job, and wait for it."""
        if context == "bridged":
            return Bridged(self, self).run(context, work, source=source, target=target)
        return jobs.wait(self.host, jobs.submit(self.host, context, work, target), context)


@dataclass(frozen=True)
class Bridged:
    """Source and target in two places: the states of the one travel as values to the other.

    Attributes:
        source: Where M runs.
        target: Where M* runs.
    """

    source: Backend
    target: Backend
    remote: bool = True

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.source.name} -> {self.target.name}"

    def run(self, context: Context, work: Work, *, source: Model, target: Model) -> Results:  # noqa: ARG002
        """Run the source's half, then the target's."""
        return self.target.run("session", self.read(work, source=source), source=target, target=target)

    def read(self, work: Work, *, source: Model) -> Work:
        """Run the source's half of a step, and give the target's."""
        read = self.source.run("session", source_half(work), source=source, target=source)
        return target_half(work, in_place_of(work, read["kept"]))


def backend_for(
    remote: bool | str,  # noqa: FBT001 (the value of an option, as users give it)
    source_remote: bool | str | None = None,  # noqa: FBT001 (the same)
) -> Backend:
    """The backend that options name.

    Args:
        remote: Where M* runs. False: in this process; True: on the NDIF that nnsight is configured for; a
            URL: on that one; `local`: the rehearsal.
        source_remote: Where M runs; None is where M* does.

    Raises:
        InputError: Any other value.
    """
    target = _place(remote)
    source = target if source_remote is None else _place(source_remote)
    return target if source == target else Bridged(source, target)


def on_server(remote: bool | str | None) -> bool:  # noqa: FBT001 (the value of an option, as users give it)
    """Whether an option names a server, and not this process."""
    return remote not in (False, None, "local")


def _place(remote: bool | str) -> Backend:  # noqa: FBT001 (the same)
    if remote is False:
        return Local()
    return Rehearsal() if remote == "local" else Ndif(jobs.host_of(remote))


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


def execute(
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
        yield from _execute(
            plan, source, target, mapping, backend, listener=None if backend.remote else listener
        )


def _execute(
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
    ends = set(readout.get("eos", ()))
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
