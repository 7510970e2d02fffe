"""Builds a plan, in six transformations.

1. Deduplication (`survey.py`): cells of different data rows that are the same run are run once.
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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from patchscope_nn._util.ragged import Ints, ranges
from patchscope_nn.errors import InputError
from patchscope_nn.models import FUSED, Withheld
from patchscope_nn.plan.budget import MAX_ROWS, MEMORY, Budget, Costs
from patchscope_nn.plan.order import Group, group_entries
from patchscope_nn.plan.pack import Packer, from_cache
from patchscope_nn.plan.passes import Context, Optimisations, Step
from patchscope_nn.plan.proven import allowed
from patchscope_nn.plan.sources import Reader
from patchscope_nn.plan.survey import Survey, survey_cells
from patchscope_nn.spec import SITES
from patchscope_nn.sweep import CellBlock, Flags, Sweep

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
        served_by: For each cell, the number of the cell whose result it has: its own, unless it is a copy.
        groups: The entries, in the order in which they run.
        done: The numbers of cells that were finished before.
        runs: True for each cell that runs: it is not done, and no copy of another.
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
    served_by: Ints = field(repr=False)
    groups: tuple[Group, ...] = field(repr=False)
    done: Ints = field(repr=False)
    runs: Flags = field(repr=False)
    independent: bool = False
    withheld: tuple[Withheld, ...] = ()
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
            entries=np.array([entry for group in self.groups for entry in group.entries], np.int64),
            carries=not self.independent,
        )
        for group, numbers, next_entry in self._windows():
            block = self.sweep.cells.block(numbers)
            reads = reader.read(block, next_entry=next_entry)
            targets = packer.passes(block, group.prefix)
            shares = any(target.layout and target.layout.prefix for target in targets)
            prefix = group.prefix if shares else ()
            yield Step(
                context=self.context,
                cells=block,
                sources=reads.passes,
                targets=targets,
                carried=reads.carried,
                kept=reads.kept,
                dropped=reads.dropped,
                prefix=prefix,
            )

    def _windows(self) -> Iterator[tuple[Group, Ints, int]]:
        """Transformation 3: yield (group, cells, index of the first entry with cells left) for each step."""
        starts, most = self.sweep.cells.starts, self._most
        n_before = 0
        for group in self.groups:
            entries = np.array(group.entries)
            counts = starts[entries + 1] - starts[entries]
            numbers, place = ranges(starts[entries], counts), np.repeat(np.arange(len(entries)), counts)
            left = self.runs[numbers]
            numbers, place = numbers[left], place[left]
            for start in range(0, len(numbers), most):
                ended = start + most >= len(numbers)
                next_place = len(entries) if ended else int(place[start + most])
                yield group, numbers[start : start + most], n_before + next_place
            n_before += len(entries)

    @property
    def _most(self) -> int:
        """The most cells of a step.

        An engine of requests runs those of a step together. The keys and values of all must fit into its
        memory: otherwise it would compute some prompts again, without their patches.
        """
        sweep, budget = self.sweep, self.budget
        if not sweep.target.supports("requests"):
            n_passes = _DECODING_PASSES_PER_STEP if sweep.scope.readout.decodes else _PASSES_PER_STEP
            return budget.max_rows * n_passes
        longest = int(sweep.target_tokens.counts.max() + sweep.appended.max())
        held = -(-longest // sweep.target.held_block) * sweep.target.held_block
        return max(1, min(budget.max_rows, budget.memory // Costs(info=sweep.target).cached(held)))

    def copies(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Return the copies of some cells that run, and for each copy the index in `numbers` of its cell."""
        first = np.searchsorted(self._copies[0], numbers)
        counts = np.searchsorted(self._copies[0], numbers, side="right") - first
        return self._copies[1][ranges(first, counts)], np.repeat(np.arange(len(numbers)), counts)

    @cached_property
    def _copies(self) -> tuple[Ints, Ints]:
        """The cells that copies are served by, sorted, and the copies."""
        copied = self.served_by != np.arange(len(self.served_by))
        copied[self.done] = False
        copies = copied.nonzero()[0]
        order = np.argsort(self.served_by[copies], kind="stable")
        return self.served_by[copies][order], copies[order]

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
    done: Collection[int] | Ints = (),
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
    survey = survey_cells(sweep, done, optimisations)
    content = (survey.digest, usual, budget, optimisations)
    planned = Plan(
        sweep=sweep,
        context=usual,
        budget=budget,
        optimisations=optimisations,
        digest=hashlib.sha256(repr(content).encode()).hexdigest()[:16],
        n_cells=sum(survey.kinds.values()),
        kinds=survey.kinds,
        served_by=survey.served_by,
        groups=_groups(sweep, survey, budget, optimisations),
        done=np.fromiter(done, np.int64, len(done)),
        runs=survey.runs,
        independent=remote,
        withheld=withheld,
    )
    not_fused = _why_not_fused(planned)
    if context == "fused" and not_fused:
        raise InputError(f"context='fused' {not_fused}.", hint="Use context='session' (or 'auto').")
    few = survey.runs.sum() <= _FEW and not sweep.target.supports("requests")
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
    requests = any(info.supports("requests") for info in (sweep.source, sweep.target))
    if requests:
        contexts = contexts[:1]
    elif not one_model and not remote:
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


def _groups(sweep: Sweep, survey: Survey, budget: Budget, optimisations: Optimisations) -> tuple[Group, ...]:
    """Transformation 2: order the entries that have cells to run."""
    running = np.add.reduceat(survey.runs, sweep.cells.starts[:-1], dtype=np.int64)
    entries = running.nonzero()[0].tolist()
    if not optimisations.prefix_sharing:
        return (Group(tuple(entries), ()),) if entries else ()
    return tuple(group_entries(sweep, entries, cells_of=running, enough=budget.max_rows))


def _fuse(planned: Plan, *, forced: bool) -> Step | None:
    """Transformation 6: make one step whose single forward pass runs sources and targets; None if it cannot.

    All rows of a batch go through a block at the same time, so a state can be written in the block where it
    is read, or later.

    Raises:
        InputError: It cannot, and is `forced`.
    """
    sweep = planned.sweep
    steps = [*planned.steps()]
    if not _fuses(sweep):
        if forced:
            raise InputError(
                "context='fused' takes one state of a prompt and writes it once; this Patchscope does more.",
                hint="Use context='session' (or 'auto').",
            )
        return None
    blocks = [step.cells for step in steps]
    read = np.concatenate([np.empty(0, np.int64), *(block.layer[block.patched] for block in blocks)])
    unfit = next((cell for block in blocks for cell in block.take(_too_late(sweep, block, read))), None)
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
    widths = {*sweep.source_tokens.counts[step.sources[0].prompts].tolist()}
    widths |= {*sweep.target_tokens.counts[step.cells.target_prompt].tolist()}
    return optimisations.mixed_lengths or len(widths) == 1


def _fuses(sweep: Sweep) -> bool:
    """Return whether source and target may share a forward pass: a cell writes one state, once."""
    source, target = sweep.scope.source, sweep.scope.target
    computed = source.vector or source.minus or source.mean or not target.needs_state
    return not (computed or sweep.scope.readout.runs_unpatched or target.alters or target.window > 1)


def _too_late(sweep: Sweep, block: CellBlock, read: Ints) -> Flags:
    """Return which cells a forward pass that reads the layers `read` cannot write any more at their l*."""
    read_site, written_site = (SITES[side.site] for side in (sweep.scope.source, sweep.scope.target))
    late = block.layer > block.target_layer
    if read_site.space != written_site.space:
        late |= np.isin(block.target_layer, read)
    return block.patched & late
