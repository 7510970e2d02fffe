"""Planning: cells -> the forward passes that serve them. Pure; no tensors, no weights.

1. cut the cells, in order, into steps (a step is one context: what is done together or lost together);
2. in each step run the source prompts not yet run, once, for every state that any later cell needs;
3. batch the step's cells as rows of target passes, prompts of one length together, within the budget;
4. let states that later steps need leave the step and be carried to them;
5. where one model does few cells and l <= l*, let source and target share one forward (fused).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from patchscope_nn.cells import Cell, Sweep
from patchscope_nn.errors import InputError
from patchscope_nn.spec import Choices, Generate

Context: TypeAlias = Literal["fused", "session", "nested", "bridged"]
MAX_ROWS = 128
MAX_TOKENS = 4096
_PASSES_PER_STEP = 4
_FEW = 8


class State(NamedTuple):
    """What a source pass reads: a hidden state, or (layer None) the final next-token distribution.

    Attributes:
        prompt: S, a number.
        positions: i, from the left.
        layer: l; None for the distribution after the last of the positions.
    """

    prompt: int
    positions: tuple[int, ...]
    layer: int | None


class SourcePass(NamedTuple):
    """One forward of M over a batch of source prompts.

    Attributes:
        prompts: The batch's rows.
        states: What is read.
    """

    prompts: tuple[int, ...]
    states: tuple[State, ...]


class TargetPass(NamedTuple):
    """One patched forward of M* (and what its readout runs after it).

    Attributes:
        cells: The batch's rows, as places in `Plan.cells`.
    """

    cells: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One context.

    Attributes:
        context: How it is opened.
        sources: Source passes.
        targets: Target passes.
        carried: States that come in from earlier steps.
        kept: States that go out to later ones.
    """

    context: Context
    sources: tuple[SourcePass, ...]
    targets: tuple[TargetPass, ...]
    carried: tuple[State, ...] = ()
    kept: tuple[State, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run.

    Attributes:
        sweep: The sweep it serves.
        cells: The cells that are to be run, in order.
        steps: The contexts, in order.
        max_rows: The most rows of a pass.
        max_tokens: The most padded tokens of a pass.
    """

    sweep: Sweep = field(repr=False)
    cells: tuple[Cell, ...] = field(repr=False)
    steps: tuple[Step, ...]
    max_rows: int
    max_tokens: int

    @property
    def digest(self) -> str:
        """Hex digest of the cells and of the passes that serve them."""
        said = ([cell.key for cell in self.cells], self.steps, self.max_rows, self.max_tokens)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    def totals(self) -> dict[str, int]:
        """Counts of what will run: steps, passes, rows, and tokens with their padding."""
        sources = [one for step in self.steps for one in step.sources]
        targets = [one for step in self.steps for one in step.targets]
        return {
            "cells": len(self.cells),
            "steps": len(self.steps),
            "source_passes": len(sources),
            "source_rows": sum(len(one.prompts) for one in sources),
            "source_tokens": sum(self.source_width(one) * len(one.prompts) for one in sources),
            "states": sum(len(one.states) for one in sources),
            "target_passes": len(targets),
            "target_rows": sum(len(one.cells) for one in targets),
            "target_tokens": sum(self.target_width(one) * len(one.cells) for one in targets),
        }

    def source_width(self, one: SourcePass) -> int:
        """The tokens of a pass's rows, padded to the longest."""
        return max(len(self.sweep.source_prompts[prompt].ids) for prompt in one.prompts)

    def target_width(self, one: TargetPass) -> int:
        """The same of a target pass, before its readout."""
        prompts = (self.cells[cell].target_prompt for cell in one.cells)
        return max(len(self.sweep.target_prompts[prompt].ids) for prompt in prompts)

    def width(self, step: Step) -> int:
        """The tokens of a step's longest row on either side."""
        return max(*map(self.source_width, step.sources), *map(self.target_width, step.targets))

    def __str__(self) -> str:
        from patchscope_nn.plan_text import render_plan

        return render_plan(self)


def plan(
    sweep: Sweep,
    *,
    context: Context | Literal["auto"] = "auto",
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    done: Collection[str] = (),
    remote: bool = False,
) -> Plan:
    """Plan the passes that serve a sweep's cells.

    Args:
        sweep: The cells.
        context: `auto` chooses; `fused` and `session` need one model, `nested` and `bridged` are for two.
        max_rows: The most rows of a pass.
        max_tokens: The most tokens of a pass, padding and tokens to be generated included; a single row
            may be longer.
        done: Keys of cells that are finished already; they are left out.
        remote: Whether the models are behind a remote backend, which runs one model a request.

    Returns:
        The plan.

    Raises:
        InputError: The context cannot serve these cells, or a budget is below 1.
    """
    if min(max_rows, max_tokens) < 1:
        raise InputError(f"max_rows={max_rows} and max_tokens={max_tokens} should both be at least 1.")
    cells = tuple(cell for cell in sweep.cells if cell.key not in done)
    one_model = sweep.source is sweep.target
    allowed: tuple[Context, ...] = ("session", "fused") if one_model else ("bridged",)
    if not one_model and not remote:
        allowed = ("nested", "bridged")
    if context != "auto" and context not in allowed:
        where = " behind a remote backend" if remote else ""
        raise InputError(
            f"context={context!r} does not serve {'one model' if one_model else 'two models'}{where}.",
            hint=f"Use {' or '.join(allowed)}, or auto.",
        )
    budget = _Budget(sweep, cells, max_rows=max_rows, max_tokens=max_tokens)
    usual: Context = "session" if one_model else ("nested" if "nested" in allowed else "bridged")
    if context == "bridged":
        usual = context
    steps = tuple(_steps(cells, budget, usual))
    if context in ("auto", "fused") and one_model:
        steps = _fuse(sweep, cells, steps, forced=context == "fused")
    return Plan(sweep=sweep, cells=cells, steps=steps, max_rows=max_rows, max_tokens=max_tokens)


class _Budget:
    """Packs rows into passes."""

    def __init__(self, sweep: Sweep, cells: Sequence[Cell], *, max_rows: int, max_tokens: int) -> None:
        self.sweep, self.cells, self.max_rows, self.max_tokens = sweep, cells, max_rows, max_tokens

    def source_width(self, prompt: int) -> int:
        return len(self.sweep.source_prompts[prompt].ids)

    def target_width(self, cell: int) -> int:
        """The tokens of a cell's row, those its readout appends included."""
        readout, one = self.sweep.scope.readout, self.cells[cell]
        width = len(self.sweep.target_prompts[one.target_prompt].ids)
        if isinstance(readout, Generate):
            width += readout.max_new_tokens
        if isinstance(readout, Choices):
            width += max(len(ids) for ids in self.sweep.resolved[one.row].continuations)
        return width

    def pack(
        self, rows: Iterable[int], width: Callable[[int], int], *, times: int = 1
    ) -> Iterator[tuple[int, ...]]:
        """Cut rows, in order, into batches of at most `times` the budget."""
        batch: list[int] = []
        widest = 0
        for row in rows:
            wider = max(widest, width(row))
            full = len(batch) == self.max_rows * times or wider * (len(batch) + 1) > self.max_tokens * times
            if batch and full:
                yield tuple(batch)
                batch, wider = [], width(row)
            batch.append(row)
            widest = wider
        if batch:
            yield tuple(batch)


def _states(cell: Cell) -> Iterator[State]:
    """What a cell needs of source passes."""
    if cell.source_prompt is not None and cell.source_positions is not None:
        yield State(cell.source_prompt, cell.source_positions, cell.source_layer)
    if cell.reference is not None:
        prompt, position = cell.reference
        yield State(prompt, (position,), None)


def _steps(cells: Sequence[Cell], budget: _Budget, context: Context) -> Iterator[Step]:
    groups = list(budget.pack(range(len(cells)), budget.target_width, times=_PASSES_PER_STEP))
    needs = [dict.fromkeys(state for cell in group for state in _states(cells[cell])) for group in groups]
    of_prompt: dict[int, dict[State, None]] = {}
    last_use: dict[State, int] = {}
    for number, need in enumerate(needs):
        for state in need:
            of_prompt.setdefault(state.prompt, {})[state] = None
            last_use[state] = number
    ran: set[int] = set()
    carried: dict[State, None] = {}
    for number, (group, need) in enumerate(zip(groups, needs, strict=True)):
        fresh = dict.fromkeys(state.prompt for state in need if state.prompt not in ran)
        ran.update(fresh)
        by_length = sorted(fresh, key=budget.source_width)
        sources = tuple(
            SourcePass(batch, tuple(state for prompt in batch for state in of_prompt[prompt]))
            for batch in budget.pack(by_length, budget.source_width)
        )
        incoming = tuple(state for state in need if state in carried)
        carried.update(dict.fromkeys(state for one in sources for state in one.states))
        carried = {state: None for state in carried if last_use[state] > number}
        rows = sorted(group, key=budget.target_width)
        yield Step(
            context=context,
            sources=sources,
            targets=tuple(TargetPass(batch) for batch in budget.pack(rows, budget.target_width)),
            carried=incoming,
            kept=tuple(state for one in sources for state in one.states if state in carried),
        )


def _fuse(sweep: Sweep, cells: Sequence[Cell], steps: tuple[Step, ...], *, forced: bool) -> tuple[Step, ...]:
    """Step 5: a batch runs its layers in lock-step, so a state is written only where it is not yet past."""
    few = sum(len(one.cells) for step in steps for one in step.targets) <= _FEW
    if not (forced or few):
        return steps
    read = {cell.source_layer for cell in cells}
    unfit = next((cell for cell in cells if not _in_order(sweep, cell, read)), None)
    single = all(len(step.sources) == 1 == len(step.targets) and not step.carried for step in steps)
    if unfit is None and single:
        return tuple(
            Step(context="fused", sources=step.sources, targets=step.targets, kept=step.kept)
            for step in steps
        )
    if not forced:
        return steps
    if unfit is not None:
        raise InputError(
            f"context='fused' runs source and target in one forward, where the state of layer "
            f"{unfit.source_layer} cannot be written at layer {unfit.target_layer}, which came before it.",
            hint="Use context='session' (or 'auto'), or layers with l <= l*.",
        )
    raise InputError(
        "context='fused' runs all cells in one forward, and these do not fit in one.",
        hint="Use context='session' (or 'auto'), fewer cells, or a larger max_rows and max_tokens.",
    )


def _in_order(sweep: Sweep, cell: Cell, read: Collection[int | None]) -> bool:
    """Whether a forward that reads these layers for all its cells can still write where this cell asks."""
    if cell.source_layer is None or cell.target_layer is None:
        return True
    if sweep.scope.source.site != sweep.scope.target.site and cell.target_layer in read:
        return False
    return cell.source_layer <= cell.target_layer
