"""Building a plan, in five transformations.

1. deduplication: cells of different data rows that are the same run are run once;
2. cut the cells, in order, into steps (a step is one context: what is done together or lost together);
3. source sharing: in each step run the source prompts not yet run, once, for every state that any later cell
   needs; states that later steps need leave the step and are carried to them;
4. row packing: serve the step's cells in passes within the budget, as segments of one sequence (`layout.py`:
   prefix sharing and late entry), or where that cannot be as rows of a padded batch;
5. where one model does few cells and l <= l*, let source and target share one forward (fused).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from patchscope_nn.cells import Cell, Sweep
from patchscope_nn.errors import InputError
from patchscope_nn.plan.layout import branches_at, lay_out, shared_prefix
from patchscope_nn.plan.passes import Context, Optimisations, Plan, SourcePass, State, Step, TargetPass
from patchscope_nn.spec import Choices, Generate

MAX_ROWS = 256
MAX_TOKENS = 4096
_PASSES_PER_STEP = 4
_FEW = 8
_SHORTEST_PREFIX = 2
#: A sequence's mask grows with the square of its tokens; beyond this the mask costs more than it saves.
_LONGEST_SEQUENCE = 1024


def plan(
    sweep: Sweep,
    *,
    context: Context | Literal["auto"] = "auto",
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    done: Collection[str] = (),
    remote: bool = False,
    optimisations: Optimisations | None = None,
) -> Plan:
    """Plan the passes that serve a sweep's cells.

    Args:
        sweep: The cells.
        context: `auto` chooses; `fused` and `session` need one model, `nested` and `bridged` are for two.
        max_rows: The most cells of a pass.
        max_tokens: The most tokens of a pass, padding and tokens to be generated included; a single row
            may be longer.
        done: Keys of cells that are finished already; they are left out.
        remote: Whether the models are behind a remote backend, which runs one model a request.
        optimisations: What it may do to run less; None is all of it.

    Returns:
        The plan.

    Raises:
        InputError: The context cannot serve these cells, or a budget is below 1.
    """
    if min(max_rows, max_tokens) < 1:
        raise InputError(f"max_rows={max_rows} and max_tokens={max_tokens} should both be at least 1.")
    usual = _usual_context(sweep, context, remote=remote)
    optimisations = optimisations or Optimisations()
    cells = tuple(cell for cell in sweep.cells if cell.key not in done)
    copies = _deduplicate(cells) if optimisations.deduplication else dict.fromkeys(range(len(cells)), ())
    builder = _Builder(sweep, cells, max_rows=max_rows, max_tokens=max_tokens, optimisations=optimisations)
    steps = tuple(builder.steps(tuple(copies), usual))
    if context in ("auto", "fused") and usual == "session":
        steps = _fuse(sweep, cells, steps, builder, forced=context == "fused")
    return Plan(
        sweep=sweep,
        cells=cells,
        steps=steps,
        max_rows=max_rows,
        max_tokens=max_tokens,
        optimisations=optimisations,
        copies={cell: others for cell, others in copies.items() if others},
    )


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


def _deduplicate(cells: Sequence[Cell]) -> dict[int, tuple[int, ...]]:
    """Transformation 1: the cells that run, in order, each with those it also runs for."""
    first: dict[int, int] = {}
    copies: dict[int, tuple[int, ...]] = {}
    for place, cell in enumerate(cells):
        at = first.setdefault(cell.seed, place)
        copies[at] = (*copies[at], place) if at in copies else ()
    return copies


def _states(cell: Cell) -> Iterator[State]:
    """What a cell needs of source passes."""
    if cell.source_prompt is not None and cell.source_positions is not None:
        yield State(cell.source_prompt, cell.source_positions, cell.source_layer)
    if cell.reference is not None:
        prompt, position = cell.reference
        yield State(prompt, (position,), None)


class _Builder:
    """Transformations 2 to 4, for one sweep and one budget."""

    def __init__(
        self,
        sweep: Sweep,
        cells: Sequence[Cell],
        *,
        max_rows: int,
        max_tokens: int,
        optimisations: Optimisations,
    ) -> None:
        self.sweep, self.cells, self.optimisations = sweep, cells, optimisations
        self.max_rows, self.max_tokens = max_rows, max_tokens
        packable = sweep.target.architecture.packs and sweep.scope.target.site == "residual"
        self.packing = optimisations.packing and packable

    def steps(self, running: Sequence[int], context: Context) -> Iterator[Step]:
        """Transformations 2 and 3."""
        width = self.own_tokens if self.packing else self.row_tokens
        groups = list(self.batches(running, width, times=_PASSES_PER_STEP))
        needs = [
            dict.fromkeys(state for cell in group for state in _states(self.cells[cell])) for group in groups
        ]
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
            by_length = sorted(fresh, key=self.source_tokens)
            sources = tuple(
                SourcePass(batch, tuple(state for prompt in batch for state in of_prompt[prompt]))
                for batch in self.batches(by_length, self.source_tokens)
            )
            incoming = tuple(state for state in need if state in carried)
            carried.update(dict.fromkeys(state for one in sources for state in one.states))
            carried = {state: None for state in carried if last_use[state] > number}
            kept = tuple(state for one in sources for state in one.states if state in carried)
            step = Step(context=context, sources=sources, targets=(), carried=incoming, kept=kept)
            yield self.pack(step, group) if self.packing else self.pad(step, group)

    def pad(self, step: Step, group: Sequence[int]) -> Step:
        """Transformation 4, as rows of padded batches: prompts of one length together."""
        rows = sorted(group, key=self.row_tokens)
        batches = self.batches(rows, self.row_tokens)
        return replace(step, targets=tuple(TargetPass(batch) for batch in batches), prefix=None)

    def pack(self, step: Step, group: Sequence[int]) -> Step:
        """Transformation 4, as segments of one sequence."""
        prefix = shared_prefix(self.sweep, (self.cells[cell] for cell in group))
        if prefix < _SHORTEST_PREFIX or not self.optimisations.prefix_sharing:
            prefix = 0
        targets = tuple(
            TargetPass(
                batch,
                lay_out(
                    self.sweep,
                    [self.cells[cell] for cell in batch],
                    prefix=prefix,
                    late_entry=self.optimisations.late_entry,
                ),
            )
            for batch in self.packed(group, prefix)
        )
        shared = (self.cells[group[0]].target_prompt, prefix) if prefix else None
        return replace(step, targets=targets, prefix=shared)

    def packed(self, group: Sequence[int], prefix: int) -> Iterator[tuple[int, ...]]:
        """Cut a step's cells into passes; a clean prompt counts once a pass.

        Where decoding goes on from a pass, its prompts have one length, so that its rows need no padding.
        """
        decodes = self.sweep.scope.readout.decodes
        longest = min(self.max_tokens, _LONGEST_SEQUENCE)
        if decodes:  # each cell becomes a row of its own
            longest = self.max_tokens
        batch: list[int] = []
        seen: set[int] = set()
        tokens = 0
        for cell in sorted(group, key=self.prompt_tokens) if decodes else group:
            prompt = self.cells[cell].target_prompt
            trunk = 0 if prompt in seen else self.prompt_tokens(cell) - prefix
            more = self.own_tokens(cell) + trunk
            other = bool(batch) and self.prompt_tokens(cell) != self.prompt_tokens(batch[-1])
            if batch and (len(batch) == self.max_rows or tokens + more > longest or (decodes and other)):
                yield tuple(batch)
                batch, seen, tokens = [], set(), 0
                more = self.own_tokens(cell) + self.prompt_tokens(cell) - prefix
            batch.append(cell)
            seen.add(prompt)
            tokens += more
        if batch:
            yield tuple(batch)

    def source_tokens(self, prompt: int) -> int:
        """The tokens of a source prompt."""
        return len(self.sweep.source_prompts[prompt].ids)

    def prompt_tokens(self, cell: int) -> int:
        """The tokens of a cell's target prompt."""
        return len(self.sweep.target_prompts[self.cells[cell].target_prompt].ids)

    def own_tokens(self, cell: int) -> int:
        """The tokens that are a cell's own; where decoding goes on, those of its whole row."""
        if self.sweep.scope.readout.decodes:
            return self.row_tokens(cell)
        return self.prompt_tokens(cell) - branches_at(self.cells[cell])

    def row_tokens(self, cell: int) -> int:
        """The tokens of a cell's row, those its readout appends included."""
        readout = self.sweep.scope.readout
        width = self.prompt_tokens(cell)
        if isinstance(readout, Generate):
            width += readout.max_new_tokens
        if isinstance(readout, Choices):
            width += max(len(ids) for ids in self.sweep.resolved[self.cells[cell].row].continuations)
        return width

    def batches(
        self, rows: Iterable[int], width: Callable[[int], int], *, times: int = 1
    ) -> Iterator[tuple[int, ...]]:
        """Cut rows, in order, into batches of at most `times` the budget, each row as wide as the widest."""
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


def _fuse(
    sweep: Sweep, cells: Sequence[Cell], steps: tuple[Step, ...], builder: _Builder, *, forced: bool
) -> tuple[Step, ...]:
    """Transformation 5: a batch runs its layers in lock-step; a state is written where it is not yet past."""
    running = [cell for step in steps for one in step.targets for cell in one.cells]
    if not forced and len(running) > _FEW:
        return steps
    read = {cells[cell].source_layer for cell in running}
    unfit = next((cells[cell] for cell in running if not _in_order(sweep, cells[cell], read)), None)
    padded = [builder.pad(step, [cell for one in step.targets for cell in one.cells]) for step in steps]
    single = all(len(step.sources) == 1 == len(step.targets) and not step.carried for step in padded)
    if unfit is None and single:
        return tuple(replace(step, context="fused") for step in padded)
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
    """Whether a forward that reads these layers, for all its cells, can still write where this cell asks."""
    if cell.source_layer is None or cell.target_layer is None:
        return True
    if sweep.scope.source.site != sweep.scope.target.site and cell.target_layer in read:
        return False
    return cell.source_layer <= cell.target_layer
