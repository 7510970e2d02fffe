"""Counts what a plan will run: passes, rows, tokens, tokens x blocks, FLOPs. Pure.

A token that goes through a block counts once in `blocks`. Tokens that a readout appends are counted as if no
row ended early. FLOPs are two for each weight of a linear map that a token meets, and four for each number
that attention multiplies. Norms, activations and softmaxes (a few per cent) are left out.
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
    """What a plan or a step runs.

    Attributes:
        steps: Steps, each one context.
        source_passes: Forward passes of M.
        source_rows: Source prompts in them.
        source_tokens: Their tokens, padding included.
        source_blocks: Tokens of M times the blocks they go through.
        states: Hidden states and distributions that are read.
        target_passes: Patched forward passes of M*.
        target_rows: Cells in them.
        target_tokens: Their tokens, padding and shared prefixes included.
        target_blocks: Tokens of M* times the blocks they go through.
        readout_tokens: Tokens that the readouts append.
        readout_blocks: These tokens times the blocks they go through.
        flops: Floating-point operations of all passes.
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
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def count(planned: Plan) -> Counts:
    """Count a whole plan, making its steps one after the other."""
    total = Counts()
    prefix: tuple[int, ...] = ()
    for step in planned.steps():
        total += count_step(planned, step, prefix_known=step.prefix == prefix)
        prefix = step.prefix or prefix
    return total


def stages(planned: Plan) -> Iterator[tuple[str, Counts]]:
    """Yield (name, counts): without optimisations, then adding those of the plan one by one."""
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
    """Count one step. With `prefix_known`, the step before it has run the same prefix."""
    counts = Counts(steps=1)
    for source in step.sources:
        counts += _source(planned, source)
    if step.prefix and not prefix_known:
        tokens, info = len(step.prefix), planned.sweep.target
        blocks = tokens * info.n_layers
        flops = _flops(info, blocks=blocks, attended=blocks * tokens, read=1)
        counts += Counts(target_tokens=tokens, target_blocks=blocks, flops=flops)
    for target in step.targets:
        counts += _target(planned, step, target)
    return counts


def _flops(info: ModelInfo, *, blocks: int, attended: int, read: int) -> int:
    sizes = info.sizes
    return 2 * (blocks * sizes.block_weights + read * sizes.unembed_weights) + 4 * attended * sizes.attention


def source_width(planned: Plan, source: SourcePass) -> int:
    """Return how many tokens each row of a source pass has, padding included."""
    return int(planned.sweep.source_tokens.counts[source.prompts].max())


def target_width(planned: Plan, step: Step, target: TargetPass) -> int:
    """Return how many tokens each row of a target pass has before its readout, padding included."""
    return int(planned.sweep.target_tokens.counts[step.cells.target_prompt[target.cells]].max())


def _source(planned: Plan, source: SourcePass) -> Counts:
    sweep, info, width = planned.sweep, planned.sweep.source, source_width(planned, source)
    tokens = width * len(source.prompts)
    blocks = tokens * source.depth
    origins = sweep.states.origin(source.states[sweep.states.is_final(source.states)])
    lengths = sweep.source_tokens.counts[sweep.cells.origin_source[origins]]
    positions, _ = sweep.cells.origin_positions.take(origins)
    read = tokens if source.whole else int((lengths - positions).max(initial=0)) * len(source.prompts)
    return Counts(
        source_passes=1,
        source_rows=len(source.prompts),
        source_tokens=tokens,
        source_blocks=blocks,
        states=len(source.states),
        flops=_flops(info, blocks=blocks, attended=blocks * width, read=read),
    )


def _target(planned: Plan, step: Step, target: TargetPass) -> Counts:
    sweep, lean = planned.sweep, planned.optimisations.lean_readout
    info, layout, rows = sweep.target, target.layout, len(target.cells)
    if layout is None:
        width = target_width(planned, step, target)
        tokens, keys = width * rows, width
        blocks = tokens * info.n_layers
    else:
        tokens, keys = layout.n_tokens, layout.prefix + layout.n_tokens
        blocks = sum(layout.running(layer - 1) for layer in range(layout.depth))
    read = rows if lean else tokens
    if not sweep.scope.readout.unembeds:  # the pass stops after the last write
        layers = sweep.writes(step.cells.take(target.cells)).target_layer
        read, tokens = 0, tokens if len(layers) else 0
        blocks = tokens * (1 + int(layers.max(initial=-1))) if layout is None else blocks
    more = _appended(planned, step, target)
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


def _appended(planned: Plan, step: Step, target: TargetPass) -> int:
    """Return how many tokens a readout runs after the prompts of a pass, all rows together.

    Without cached keys and values, the prompts run again with each of them, and are counted too.
    """
    sweep, n_cells = planned.sweep, len(target.cells)
    readout = sweep.scope.readout
    again = 0 if from_cache(sweep, planned.optimisations) else target_width(planned, step, target)
    if readout.decoded:  # the last decoded token does not run
        most = readout.decoded - 1
        # The probabilities of the tokens without the patch take one more forward pass.
        plain = target_width(planned, step, target) + most if readout.runs_unpatched else 0
        return n_cells * (plain + (sum(again + count for count in range(1, most + 1)) if again else most))
    if readout.appends:
        longest = sweep.continuation_tokens[step.cells.entry[target.cells]].max(axis=0).tolist()
        # The pass of the prompt scores the first token of a choice, unless the prompt is read again.
        return n_cells * sum(again + tokens if again else tokens - 1 for tokens in longest)
    return 0
