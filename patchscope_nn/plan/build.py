"""Builds a plan, in six transformations.

1. Deduplication: cells of different data rows that are the same run are run once.
2. Order (`order.py`): entries whose target prompts begin with the same tokens run together, after one prefix.
3. Steps: the cells, in that order, are cut into steps. A step is one context.
4. Source sharing (`sources.py`): each step runs the source prompts that have not run yet, once, for every
   state that any later cell needs. States that later steps need are carried to them.
5. Row packing (`pack.py`): the cells of a step are served in passes within the budget, as segments of one
   sequence (`layout.py`: prefix sharing and late entry) if possible, else as rows of a padded batch.
6. Fusing: if there is one model, few cells, and l <= l*, source and target share one forward pass.

Steps are made on demand, so that a plan of a hundred thousand cells holds one step at a time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from patchscope_nn.errors import InputError
from patchscope_nn.models import FUSED, Withheld
from patchscope_nn.plan.budget import MAX_ROWS, MEMORY, Budget
from patchscope_nn.plan.order import Group, group_entries
from patchscope_nn.plan.pack import Packer, from_cache
from patchscope_nn.plan.passes import Context, Optimisations, Step
from patchscope_nn.plan.proven import allowed
from patchscope_nn.plan.sources import Reader
from patchscope_nn.spec import SITES
from patchscope_nn.sweep import Cell, Sweep

#: How many passes of the largest size a step holds. More cells sort into better passes; but a step that fails
#: is lost as a whole, and passes that decode are long.
_PASSES_PER_STEP, _DECODING_PASSES_PER_STEP = 8, 1
#: Up to this many cells, one fused forward pass is worth while.
_FEW = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps that serve the cells of a sweep.

    Attributes:
        sweep: The sweep.
        context: The context of every step, unless the plan is fused.
        budget: The most that a pass may hold.
        optimisations: The optimisations that are on.
        digest: Hex digest of the cells that will run, and of everything that decides their passes.
        n_cells: How many cells it serves.
        kinds: How many of them are of each kind: None for the real cells, else the control.
        copies: {number of a cell that runs: numbers of the cells that have the same result}.
        groups: The entries, in the order in which they run.
        done: The numbers of cells that were finished before.
        independent: True if no step uses states of another, so that steps can run in any order, and again.
        withheld: Optimisations that were requested, and are off because of what the models' proofs found.
    """

    sweep: Sweep = field(repr=False)
    context: Context
    budget: Budget
    optimisations: Optimisations
    digest: str
    n_cells: int
    kinds: Mapping[str | None, int]
    copies: Mapping[int, tuple[int, ...]] = field(repr=False)
    groups: tuple[Group, ...] = field(repr=False)
    done: Collection[int] = field(repr=False)
    independent: bool = False
    withheld: tuple[Withheld, ...] = ()
    _skipped: Collection[int] = field(default=(), repr=False)
    _fused: Step | None = field(default=None, repr=False)

    def steps(self) -> Iterator[Step]:
        """Make the steps, in order."""
        if self._fused is not None:
            yield self._fused
            return
        packer = Packer(self.sweep, self.budget, self.optimisations)
        reader = Reader(
            self.sweep,
            self.budget,
            self.optimisations,
            entries=[entry for group in self.groups for entry in group.entries],
            carries=not self.independent,
        )
        for group, cells, next_entry in self._windows():
            reads = reader.read(cells, next_entry=next_entry)
            targets = packer.passes(cells, group.prefix)
            shares = any(target.layout and target.layout.prefix for target in targets)
            prefix = group.prefix if shares else ()
            yield Step(
                context=self.context,
                cells=cells,
                sources=reads.passes,
                targets=targets,
                carried=reads.carried,
                kept=reads.kept,
                dropped=reads.dropped,
                prefix=prefix,
            )

    def _windows(self) -> Iterator[tuple[Group, tuple[Cell, ...], int]]:
        """Transformation 3: yield (group, cells, index of the first entry with cells left) for each step."""
        decodes = self.sweep.scope.readout.decodes
        most = self.budget.max_rows * (_DECODING_PASSES_PER_STEP if decodes else _PASSES_PER_STEP)
        next_entry = 0
        for group in self.groups:
            window: list[Cell] = []
            for entry in group.entries:
                for cell in self.sweep.cells.of_entry(entry):
                    if cell.number in self._skipped:
                        continue
                    if len(window) == most:
                        yield group, tuple(window), next_entry
                        window = []
                    window.append(cell)
                next_entry += 1
            if window:
                yield group, tuple(window), next_entry

    def __str__(self) -> str:
        from patchscope_nn.plan.text import render_plan

        return render_plan(self)

    def _repr_html_(self) -> str:
        from patchscope_nn.plan.text import plan_html

        return plan_html(self)


def plan(
    sweep: Sweep,
    *,
    context: Context | Literal["auto"] = "auto",
    max_rows: int | None = None,
    memory: int | None = None,
    done: Collection[int] = (),
    remote: bool = False,
    optimisations: Optimisations | None = None,
) -> Plan:
    """Plan the passes that serve a sweep's cells.

    Args:
        sweep: The cells.
        context: `auto` chooses; `fused` and `session` need one model, `nested` and `bridged` are for two.
        max_rows: The most cells of a pass.
        memory: The most bytes that a pass may take; a single cell may take more.
        done: The numbers of finished cells, which are left out.
        remote: True if the models run behind a remote backend, where each request runs one model.
        optimisations: The optimisations that it may use; None for all.

    Returns:
        The plan.

    Raises:
        InputError: The context cannot serve these cells, or a budget is below 1.
    """
    budget = _budget(max_rows, memory)
    usual = _usual_context(sweep, context, remote=remote)
    optimisations, withheld = allowed(sweep, optimisations or Optimisations())
    survey = _survey(sweep, done, optimisations)
    content = (survey.digest, usual, budget, optimisations, sorted(survey.skipped))
    planned = Plan(
        sweep=sweep,
        context=usual,
        budget=budget,
        optimisations=optimisations,
        digest=hashlib.sha256(repr(content).encode()).hexdigest()[:16],
        n_cells=survey.n_cells,
        kinds=survey.kinds,
        copies=survey.copies,
        groups=_groups(sweep, survey, budget, optimisations),
        done=done,
        independent=remote,
        withheld=withheld,
        _skipped=survey.skipped,
    )
    not_fused = _why_not_fused(planned)
    if context == "fused" and not_fused:
        raise InputError(f"context='fused' {not_fused}.", hint="Use context='session' (or 'auto').")
    few = sum(survey.running.values()) <= _FEW
    if usual == "session" and (context == "fused" or (context == "auto" and few and not not_fused)):
        return replace(planned, _fused=_fuse(planned, forced=context == "fused"))
    return planned


def _budget(max_rows: int | None, memory: int | None) -> Budget:
    budget = Budget(
        max_rows=MAX_ROWS if max_rows is None else max_rows, memory=MEMORY if memory is None else memory
    )
    if min(budget.max_rows, budget.memory) < 1:
        raise InputError(f"max_rows={max_rows} and memory={memory} should both be at least 1.")
    return budget


def _why_not_fused(planned: Plan) -> str:
    """Return why a fused context cannot run this readout on this model; empty if it can."""
    sweep = planned.sweep
    if sweep.scope.readout.decodes and not from_cache(sweep, planned.optimisations):
        caches = sweep.target.supports("cache")
        why = "cached_decoding is off" if caches else f"{sweep.target.family} keeps none"
        return f"decodes from keys and values, and {why}"
    unproven = next((entry for entry in planned.withheld if entry.optimisation == FUSED), None)
    return f"gives wrong results for {sweep.target.name}: {unproven.why}" if unproven else ""


def _usual_context(sweep: Sweep, context: Context | Literal["auto"], *, remote: bool) -> Context:
    """Return the context of steps that are not fused."""
    one_model = sweep.source is sweep.target
    contexts: tuple[Context, ...] = ("session", "fused") if one_model else ("bridged",)
    if not one_model and not remote:
        contexts = ("nested", "bridged")
    if context == "auto" or (context == "fused" and one_model):
        return contexts[0]
    if context in contexts:
        return context
    where = " behind a remote backend" if remote else ""
    raise InputError(
        f"context={context!r} does not serve {'one model' if one_model else 'two models'}{where}.",
        hint=f"Use {' or '.join(contexts)}, or auto.",
    )


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """The result of one pass over all cells. It holds only counts and numbers, so memory stays flat.

    Attributes:
        digest: Hex digest of the cells' seeds and the models' names.
        n_cells: How many cells are not done.
        kinds: How many of them are of each kind.
        running: {entry: how many of its cells run}.
        skipped: The numbers of cells that do not run: done before, or copies.
        copies: {number of a cell that runs: numbers of its copies}.
    """

    digest: str
    n_cells: int
    kinds: Counter[str | None]
    running: Counter[int]
    skipped: frozenset[int]
    copies: dict[int, tuple[int, ...]]


def _survey(sweep: Sweep, done: Collection[int], optimisations: Optimisations) -> _Survey:
    """Transformation 1: find copies, and count the cells that run."""
    done = frozenset(done)
    skipped = set(done)
    digest = hashlib.sha256(repr((sweep.source.name, sweep.target.name)).encode())
    kinds: Counter[str | None] = Counter()
    running: Counter[int] = Counter()
    first: dict[int, int] = {}
    copies: dict[int, tuple[int, ...]] = {}
    for cell in sweep.cells:
        if cell.number in done:
            continue
        digest.update(cell.seed.to_bytes(7))
        kinds[cell.control] += 1
        original = first.setdefault(cell.seed, cell.number) if optimisations.deduplication else cell.number
        if original == cell.number:
            running[cell.entry] += 1
        else:
            copies[original] = (*copies.get(original, ()), cell.number)
            skipped.add(cell.number)
    return _Survey(
        digest=digest.hexdigest(),
        n_cells=kinds.total(),
        kinds=kinds,
        running=running,
        skipped=frozenset(skipped),
        copies=copies,
    )


def _groups(sweep: Sweep, survey: _Survey, budget: Budget, optimisations: Optimisations) -> tuple[Group, ...]:
    """Transformation 2: order the entries that have cells to run."""
    running = survey.running
    if not optimisations.prefix_sharing:
        return (Group(tuple(running), ()),) if running else ()
    return tuple(group_entries(sweep, tuple(running), cells_of=running, enough=budget.max_rows))


def _fuse(planned: Plan, *, forced: bool) -> Step | None:
    """Transformation 6: make one step whose single forward pass runs sources and targets; None if it cannot.

    All rows of a batch go through a block at the same time, so a state can be written in the block where it
    is read, or later.

    Raises:
        InputError: It cannot, and is `forced`.
    """
    sweep = planned.sweep
    steps = [*planned.steps()]
    cells = [cell for step in steps for cell in step.cells]
    read = {cell.source_layer for cell in cells}
    if not _fuses(sweep):
        if forced:
            raise InputError(
                "context='fused' takes one state of a prompt and writes it once; this Patchscope does more.",
                hint="Use context='session' (or 'auto').",
            )
        return None
    unfit = next((cell for cell in cells if not _in_order(sweep, cell, read)), None)
    if unfit is None and len(steps) == 1 and planned.optimisations.source_sharing:
        packer = Packer(sweep, planned.budget, planned.optimisations)
        fused = replace(steps[0], context="fused", targets=packer.padded(steps[0].cells), prefix=())
        if len(fused.sources) == 1 == len(fused.targets) and _one_width(sweep, fused, planned.optimisations):
            return fused
    if not forced:
        return None
    if unfit is not None:
        raise InputError(
            f"context='fused' runs source and target in one forward, where the state of layer "
            f"{unfit.source_layer} cannot be written at layer {unfit.target_layer}, which runs before it.",
            hint="Use context='session' (or 'auto'), or layers with l <= l*.",
        )
    raise InputError(
        "context='fused' runs all cells in one forward, and these do not fit in one.",
        hint="Use context='session' (or 'auto'), fewer cells, or a larger max_rows and memory.",
    )


def _one_width(sweep: Sweep, step: Step, optimisations: Optimisations) -> bool:
    """Return whether the rows of a fused step may be padded to one width, or need no padding."""
    widths = {len(sweep.source_prompts[prompt].ids) for source in step.sources for prompt in source.prompts}
    widths |= {len(sweep.target_prompts[cell.target_prompt].ids) for cell in step.cells}
    return optimisations.mixed_lengths or len(widths) == 1


def _fuses(sweep: Sweep) -> bool:
    """Return whether source and target may share a forward pass: a cell writes one state, once."""
    source, target = sweep.scope.source, sweep.scope.target
    computed = source.vector or source.minus or source.mean or not target.needs_state
    return not (computed or sweep.scope.readout.runs_unpatched or target.alters or target.window > 1)


def _in_order(sweep: Sweep, cell: Cell, read: Collection[int | None]) -> bool:
    """Return whether a forward pass that reads the layers `read` can still write this cell's state at l*."""
    if cell.source_layer is None or cell.target_layer is None:
        return True
    read_site, written_site = (SITES[side.site] for side in (sweep.scope.source, sweep.scope.target))
    if read_site.space != written_site.space and cell.target_layer in read:
        return False
    return cell.source_layer <= cell.target_layer
