"""What a plan will run, counted: passes, rows, tokens, tokens x blocks, FLOPs. Pure.

A token that goes through a block counts once in `blocks`. Those a readout appends are counted as if no row
met its end early. FLOPs are two for each weight of a linear map a token meets, and four for each number that
attention multiplies; norms, activations and softmaxes, a few per cent, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from patchscope_nn.models import ModelInfo
from patchscope_nn.plan.build import Plan, plan
from patchscope_nn.plan.pack import from_cache
from patchscope_nn.plan.passes import Optimisations, SourcePass, Step, TargetPass


class Counts(NamedTuple):
    """What runs.

    Attributes:
        steps: Contexts.
        source_passes: Forwards of M.
        source_rows: Source prompts in them.
        source_tokens: Their tokens, padding included.
        source_blocks: Tokens of M times blocks they go through.
        states: Hidden states and distributions read.
        target_passes: Patched forwards of M*.
        target_rows: Cells in them.
        target_tokens: Their tokens, padding and shared prefixes included.
        target_blocks: Tokens of M* times blocks they go through.
        readout_tokens: Tokens the readouts append.
        readout_blocks: The same, times blocks.
        flops: All of it, in floating-point operations.
    """

    steps: int = 0
    source_passes: int = 0
    source_rows: int = 0
    source_tokens: int = 0
    source_blocks: int = 0
    states: int = 0
    target_passes: int = 0
    target_rows: int = 0
    target_tokens: int = 0
    target_blocks: int = 0
    readout_tokens: int = 0
    readout_blocks: int = 0
    flops: int = 0

    def __add__(self, other: object) -> Counts:
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(*(one + two for one, two in zip(self, other, strict=True)))


def count(planned: Plan) -> Counts:
    """Count all of a plan, making its steps one after the other."""
    total = Counts()
    prefix: tuple[int, ...] = ()
    for step in planned.steps():
        total += count_step(planned, step, prefix_known=step.prefix == prefix)
        prefix = step.prefix or prefix
    return total


def stages(planned: Plan) -> Iterator[tuple[str, Counts]]:
    """Count what would run with no optimisation, then with one more after the other, up to the plan's own."""
    names = [name for name in Optimisations.names() if getattr(planned.optimisations, name)]
    used = Optimisations.none()
    yield "none", count(_with(planned, used))
    for name in names:
        used = replace(used, **{name: True})
        yield name, count(_with(planned, used))


def _with(planned: Plan, optimisations: Optimisations) -> Plan:
    return plan(
        planned.sweep,
        context=planned.context,
        max_rows=planned.budget.max_rows,
        memory=planned.budget.memory,
        done=planned.done,
        remote=planned.independent,
        optimisations=optimisations,
    )


def count_step(planned: Plan, step: Step, *, prefix_known: bool = False) -> Counts:
    """Count one step; `prefix_known` where the step before it ran the same prefix."""
    found = Counts(steps=1)
    for source in step.sources:
        found += _source(planned, source)
    if step.prefix and not prefix_known:
        tokens, info = len(step.prefix), planned.sweep.target
        blocks = tokens * info.n_layers
        flops = _flops(info, blocks=blocks, attended=blocks * tokens, read=1)
        found += Counts(target_tokens=tokens, target_blocks=blocks, flops=flops)
    for target in step.targets:
        found += _target(planned, step, target)
    return found


def _flops(info: ModelInfo, *, blocks: int, attended: int, read: int) -> int:
    sizes = info.sizes
    return 2 * (blocks * sizes.block_weights + read * sizes.unembed_weights) + 4 * attended * sizes.attention


def source_width(planned: Plan, one: SourcePass) -> int:
    """The tokens of a source pass's rows, padded to the longest."""
    return max(len(planned.sweep.source_prompts[prompt].ids) for prompt in one.prompts)


def target_width(planned: Plan, step: Step, one: TargetPass) -> int:
    """The tokens of a target pass's rows, padded to the longest, before its readout."""
    prompts = {step.cells[place].target_prompt for place in one.cells}
    return max(len(planned.sweep.target_prompts[prompt].ids) for prompt in prompts)


def _source(planned: Plan, one: SourcePass) -> Counts:
    info, width = planned.sweep.source, source_width(planned, one)
    tokens = width * len(one.prompts)
    blocks = tokens * one.depth(info.n_layers)
    finals = [
        len(planned.sweep.source_prompts[state.prompt].ids) - state.positions[-1]
        for state in one.states
        if state.layer is None
    ]
    read = tokens if one.whole else max(finals, default=0) * len(one.prompts)
    return Counts(
        source_passes=1,
        source_rows=len(one.prompts),
        source_tokens=tokens,
        source_blocks=blocks,
        states=len(one.states),
        flops=_flops(info, blocks=blocks, attended=blocks * width, read=read),
    )


def _target(planned: Plan, step: Step, one: TargetPass) -> Counts:
    sweep, lean = planned.sweep, planned.optimisations.lean_readout
    info, layout, rows = sweep.target, one.layout, len(one.cells)
    if layout is None:
        width = target_width(planned, step, one)
        tokens, keys = width * rows, width
        blocks = tokens * info.n_layers
    else:
        tokens, keys = layout.n_tokens, layout.prefix + layout.n_tokens
        blocks = sum(layout.running(layer - 1) for layer in range(layout.depth))
    read = rows if lean else tokens
    if not sweep.scope.readout.unembeds:  # it stops where the last state is written
        layers = [layer for place in one.cells for _, layer in sweep.writes(step.cells[place])]
        read, tokens = 0, tokens if layers else 0
        blocks = tokens * (1 + max(layers, default=-1)) if layout is None else blocks
    more = _appended(planned, step, one)
    return Counts(
        target_passes=1,
        target_rows=rows,
        target_tokens=tokens,
        target_blocks=blocks,
        readout_tokens=more,
        readout_blocks=more * info.n_layers,
        flops=_flops(
            info,
            blocks=blocks + more * info.n_layers,
            attended=blocks * keys + more * info.n_layers * keys,
            read=read + more,
        ),
    )


def _appended(planned: Plan, step: Step, one: TargetPass) -> int:
    """How many tokens run behind the prompts of a pass, all rows together.

    Where no keys and values are kept, the prompts run again with them.
    """
    sweep, cells = planned.sweep, [step.cells[place] for place in one.cells]
    readout = sweep.scope.readout
    again = 0 if from_cache(sweep, planned.optimisations) else target_width(planned, step, one)
    if readout.decoded:  # the last token that is decoded is not read
        most = readout.decoded - 1
        # How likely the tokens are without the patch takes one more forward.
        plain = target_width(planned, step, one) + most if readout.runs_unpatched else 0
        return len(cells) * (plain + (sum(again + place for place in range(1, most + 1)) if again else most))
    if readout.appends:
        columns = zip(*(sweep.entries[cell.entry].continuations for cell in cells), strict=True)
        longest = [max(map(len, column)) for column in columns]
        # The first token of a choice is scored by the prompt's own pass, unless the prompt is read again.
        return len(cells) * sum(again + tokens if again else tokens - 1 for tokens in longest)
    return 0
