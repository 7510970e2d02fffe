"""Building a plan, in six transformations.

1. deduplication: cells of different data rows that are the same run are run once;
2. order (`order.py`): data rows whose target prompts begin alike run together, behind one prefix;
3. cut the cells, in that order, into steps (a step is one context);
4. source sharing: in each step run the source prompts not yet run, once, for every state that any later cell
   needs; states that later steps need leave the step and are carried to them;
5. row packing: serve the step's cells in passes within the budget, as segments of one sequence (`layout.py`:
   prefix sharing and late entry), or where that cannot be as rows of a padded batch;
6. where one model does few cells and l <= l*, let source and target share one forward (fused).

Steps are made when they are asked for, so that a plan of a hundred thousand cells holds one step at a time.
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

#: A step is what is lost together. Decoding makes its passes long; else more cells sort into better passes.
_PASSES_PER_STEP, _DECODING_PASSES_PER_STEP = 8, 1
_FEW = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run.

    Attributes:
        sweep: The sweep it serves.
        context: The context of its steps, but for a fused one.
        budget: What a pass may hold.
        optimisations: What it does to run less.
        digest: Hex digest of the cells that will run, and of all that decides their passes.
        n_cells: How many cells it serves.
        kinds: How many of them are of each kind: None for the real cells, else the control.
        copies: For a cell that runs for others too, these others' numbers.
        groups: The entries of the data rows, in the order in which they run.
        done: The numbers of cells that were finished before.
        independent: Whether no step uses what another read, so that they can run in any order, and again.
        withheld: Optimisations that were wanted, and are off because of what the models' proofs found.
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
        """Make the contexts, in order."""
        if self._fused is not None:
            yield self._fused
            return
        packer = Packer(self.sweep, self.budget, self.optimisations)
        reader = Reader(
            self.sweep,
            self.budget,
            self.optimisations,
            entries=[*self._entries()],
            carries=not self.independent,
        )
        for group, cells, place in self._windows():
            reads = reader.read(cells, next_entry=place)
            targets = packer.passes(cells, group.prefix)
            prefix = group.prefix if any(one.layout and one.layout.prefix for one in targets) else ()
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

    def _entries(self) -> Iterator[int]:
        for group in self.groups:
            yield from group.entries

    def _windows(self) -> Iterator[tuple[Group, tuple[Cell, ...], int]]:
        """Transformation 3: the cells of a step, and the place in the order of what is yet to run."""
        decodes = self.sweep.scope.readout.decodes
        most = self.budget.max_rows * (_DECODING_PASSES_PER_STEP if decodes else _PASSES_PER_STEP)
        place = 0
        for group in self.groups:
            window: list[Cell] = []
            for entry in group.entries:
                for cell in self.sweep.cells.of_entry(entry):
                    if cell.number in self._skipped:
                        continue
                    if len(window) == most:
                        yield group, tuple(window), place
                        window = []
                    window.append(cell)
                place += 1
            if window:
                yield group, tuple(window), place

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
        memory: The most bytes a pass may take; a single cell may take more.
        done: The numbers of cells that are finished already; they are left out.
        remote: Whether the models are behind a remote backend, which runs one model a request.
        optimisations: What it may do to run less; None is all of it.

    Returns:
        The plan.

    Raises:
        InputError: The context cannot serve these cells, or a budget is below 1.
    """
    budget = Budget(
        max_rows=MAX_ROWS if max_rows is None else max_rows, memory=MEMORY if memory is None else memory
    )
    if min(budget.max_rows, budget.memory) < 1:
        raise InputError(f"max_rows={max_rows} and memory={memory} should both be at least 1.")
    usual = _usual_context(sweep, context, remote=remote)
    optimisations, withheld = allowed(sweep, optimisations or Optimisations())
    found = _survey(sweep, done, optimisations)
    said = (found.digest, usual, budget, optimisations, sorted(found.skipped))
    groups = _groups(sweep, found, budget, optimisations)
    planned = Plan(
        sweep=sweep,
        context=usual,
        budget=budget,
        optimisations=optimisations,
        digest=hashlib.sha256(repr(said).encode()).hexdigest()[:16],
        n_cells=found.n_cells,
        kinds=found.kinds,
        copies=found.copies,
        groups=groups,
        done=done,
        independent=remote,
        withheld=withheld,
        _skipped=found.skipped,
    )
    few = sum(found.running.values()) <= _FEW
    rereads = sweep.scope.readout.decodes and not from_cache(sweep, optimisations)
    if rereads and context == "fused":
        raise InputError(
            f"context='fused' decodes from keys and values, and {_why_no_cache(sweep)}.",
            hint="Use context='session' (or 'auto').",
        )
    unproven = next((entry for entry in withheld if entry.optimisation == FUSED), None)
    if unproven and context == "fused":
        raise InputError(
            f"context='fused' is wrong for {sweep.target.name}: {unproven.why}.",
            hint="Use context='session' (or 'auto').",
        )
    may_fuse = few and not rereads and not unproven
    if usual == "session" and (context == "fused" or (context == "auto" and may_fuse)):
        return replace(planned, _fused=_fuse(planned, forced=context == "fused"))
    return planned


def _usual_context(sweep: Sweep, context: Context | Literal["auto"], *, remote: bool) -> Context:
    """The context of steps that are not fused."""
    one_model = sweep.source is sweep.target
    allowed: tuple[Context, ...] = ("session", "fused") if one_model else ("bridged",)
    if not one_model and not remote:
        allowed = ("nested", "bridged")
    if context == "auto" or (context == "fused" and one_model):
        return allowed[0]
    if context in allowed:
        return context
    where = " behind a remote backend" if remote else ""
    raise InputError(
        f"context={context!r} does not serve {'one model' if one_model else 'two models'}{where}.",
        hint=f"Use {' or '.join(allowed)}, or auto.",
    )


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What one look at every cell finds: numbers and digests, which are small, and no cell."""

    digest: str
    n_cells: int
    kinds: Counter[str | None]
    running: Counter[int]
    skipped: frozenset[int]
    copies: dict[int, tuple[int, ...]]


def _survey(sweep: Sweep, done: Collection[int], optimisations: Optimisations) -> _Survey:
    """Transformation 1, and a count; `running` counts the cells of each entry that run."""
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
        at = first.setdefault(cell.seed, cell.number) if optimisations.deduplication else cell.number
        if at == cell.number:
            running[cell.entry] += 1
        else:
            copies[at] = (*copies.get(at, ()), cell.number)
            skipped.add(cell.number)
    return _Survey(
        digest=digest.hexdigest(),
        n_cells=kinds.total(),
        kinds=kinds,
        running=running,
        skipped=frozenset(skipped),
        copies=copies,
    )


def _groups(sweep: Sweep, found: _Survey, budget: Budget, optimisations: Optimisations) -> tuple[Group, ...]:
    """Transformation 2."""
    if not optimisations.prefix_sharing:
        return (Group(tuple(found.running), ()),) if found.running else ()
    return tuple(group_entries(sweep, tuple(found.running), cells_of=found.running, enough=budget.max_rows))


def _fuse(planned: Plan, *, forced: bool) -> Step | None:
    """Transformation 6: a batch runs its layers in lock-step; a state is written where it is not yet past."""
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
            f"{unfit.source_layer} cannot be written at layer {unfit.target_layer}, which came before it.",
            hint="Use context='session' (or 'auto'), or layers with l <= l*.",
        )
    raise InputError(
        "context='fused' runs all cells in one forward, and these do not fit in one.",
        hint="Use context='session' (or 'auto'), fewer cells, or a larger max_rows and memory.",
    )


def _why_no_cache(sweep: Sweep) -> str:
    caches = sweep.target.supports("cache")
    return "cached_decoding is off" if caches else f"{sweep.target.family} keeps none"


def _one_width(sweep: Sweep, step: Step, optimisations: Optimisations) -> bool:
    """Whether the rows of a fused step may be padded to one width, or need no padding."""
    widths = {len(sweep.source_prompts[prompt].ids) for one in step.sources for prompt in one.prompts}
    widths |= {len(sweep.target_prompts[cell.target_prompt].ids) for cell in step.cells}
    return optimisations.mixed_lengths or len(widths) == 1


def _fuses(sweep: Sweep) -> bool:
    """Whether source and target may share a forward: what is written is one state, once."""
    source, target = sweep.scope.source, sweep.scope.target
    made = source.vector or source.minus or source.mean or not target.needs_state
    return not (made or sweep.scope.readout.runs_unpatched or target.alters or target.window > 1)


def _in_order(sweep: Sweep, cell: Cell, read: Collection[int | None]) -> bool:
    """Whether a forward that reads these layers, for all its cells, can still write where this cell asks."""
    if cell.source_layer is None or cell.target_layer is None:
        return True
    read_site, written_site = (SITES[side.site] for side in (sweep.scope.source, sweep.scope.target))
    if read_site.space != written_site.space and cell.target_layer in read:
        return False
    return cell.source_layer <= cell.target_layer
