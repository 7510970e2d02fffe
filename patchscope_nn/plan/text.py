"""Draws a plan as a tree, to be read before it is run."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from patchscope_nn.models import ELSEWHERE, TRANSFORMERS, ModelInfo, cost_of
from patchscope_nn.plan.build import Plan
from patchscope_nn.plan.count import Counts, count, count_step, source_width, stages, target_width
from patchscope_nn.plan.pack import packs, why_copied
from patchscope_nn.plan.passes import Step
from patchscope_nn.spec import SITES

_SHOWN = 6
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def render_plan(planned: Plan) -> str:
    """Draw a plan: its models, cells and counts, what each optimisation saves, and its first contexts.

    Args:
        planned: The plan.

    Returns:
        Lines of text.
    """
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(f"plan {planned.digest}"))
    totals = count(planned)
    for line in _facts(planned, totals):
        tree.add(Text(line))
    if planned.n_cells:
        tree.add(Text("what each optimisation leaves to run")).add(_stages(planned))
    steps = list(islice(planned.steps(), _SHOWN))
    branch = tree.add(Text(f"contexts: {totals.steps} {steps[0].context}" if steps else "contexts: none"))
    for number, step in enumerate(steps):
        _add_step(branch, planned, number, step)
    if totals.steps > len(steps):
        branch.add(Text(f"... and {totals.steps - len(steps)} more like these"))
    console = Console(file=io.StringIO(), width=160, no_color=True, force_jupyter=False)
    console.print(tree)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # the StringIO given above
    return "\n".join(line.rstrip() for line in lines)


def plan_html(planned: Plan) -> str:
    """Return a plan as HTML for notebooks: its facts, what each optimisation leaves to run, and the tree.

    Args:
        planned: The plan.
    """
    totals = count(planned)
    facts = "".join(f"<li>{html.escape(line)}</li>" for line in _facts(planned, totals))
    stage = ""
    if planned.n_cells:
        table = _stages(planned)
        head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
        lines = zip(*(list(column.cells) for column in table.columns), strict=True)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in line)}</tr>" for line in lines
        )
        stage = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    tree = f"<details><summary>all of it</summary><pre>{html.escape(render_plan(planned))}</pre></details>"
    return f"<div><h4>plan {html.escape(planned.digest)}</h4><ul>{facts}</ul>{stage}{tree}</div>"


def _facts(planned: Plan, totals: Counts) -> Iterator[str]:
    sweep = planned.sweep
    readout, budget = sweep.scope.readout, planned.budget
    kinds = ", ".join(f"{number} {kind or 'patched'}" for kind, number in planned.kinds.items())
    yield f"M:  {_describe(sweep.source)}"
    yield f"M*: {'the same' if sweep.target is sweep.source else _describe(sweep.target)}"
    yield f"cells: {planned.n_cells} ({kinds}), of which {totals.target_rows} run"
    yield (
        f"source: {totals.source_passes} passes, {totals.source_rows} prompts, "
        f"{totals.source_tokens} tokens with padding, {totals.states} states read"
    )
    more = f", then up to {readout.decoded} each" if readout.decoded else ""
    yield (
        f"target: {totals.target_passes} passes, {totals.target_rows} rows, "
        f"{totals.target_tokens} tokens{more}"
    )
    yield (
        f"readout: {readout.name}; a pass holds at most {budget.max_rows} rows and {size_text(budget.memory)}"
    )
    yield from (f"note: {notice}" for notice in sweep.notices)
    if sweep.target.supports("requests"):
        yield (
            f"note: each prompt is a request of its own, and {sweep.target.engine} batches those of a "
            "context; prefix sharing and late entry save nothing there"
        )
    elif not packs(sweep, planned.optimisations) and planned.n_cells:
        yield f"note: {_why_padded(planned)}, so every cell is a row of a padded batch of whole prompts"
    if sweep.scope.readout.decodes and not sweep.target.supports("cache"):
        name = sweep.target.family
        yield f"note: {name} keeps no keys and values, so each decoded token reads its prompt again"
    for entry in planned.withheld:
        yield f"note: {entry} ({entry.why}), so {cost_of(entry.optimisation)}"
    for info in dict.fromkeys((sweep.source, sweep.target)):
        if info.verdict is None:
            later = ": its first job carries the proof" if info.device == ELSEWHERE else ""
            yield f"note: {info.name} is not proven{later}"
    if sinks := _sinks(planned):
        yield f"note: {sinks}; in most models it is an attention sink, whose state is huge and says little"


def _sinks(planned: Plan) -> str:
    reads = writes = 0
    cells = planned.sweep.cells
    for step in planned.steps():
        block = step.cells.take(step.cells.patched)
        if cells.writes_state and planned.sweep.scope.source.vector is None:
            origins = cells.read_origins.values[cells.read_origins.starts[block.read]]
            positions, index = cells.origin_positions.take(origins)
            reads += len(np.unique(index[positions == 0]))
        writes += int((cells.first_position[block.positions] == 0).sum())
    return f"{reads} cells read and {writes} write position 0" if reads + writes else ""


def _stages(planned: Plan) -> Any:
    """A table of counts: without optimisations, then with one more on each line."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("with")
    for name in ("passes", "tokens", "tokens x blocks", "FLOPs", "of all"):
        table.add_column(name, justify="right")
    first = 0
    for name, counts in stages(planned):
        first = first or counts.flops
        blocks = counts.source_blocks + counts.target_blocks + counts.readout_blocks
        tokens = counts.source_tokens + counts.target_tokens + counts.readout_tokens
        table.add_row(
            "nothing" if name == "none" else f"+ {name.replace('_', ' ')}",
            f"{counts.source_passes + counts.target_passes:,}",
            f"{tokens:,}",
            f"{blocks:,}",
            f"{counts.flops:.3g}",
            f"{100 * counts.flops / first:.1f} %",
        )
    return table


def _why_padded(planned: Plan) -> str:
    sweep, used = planned.sweep, planned.optimisations
    if not (used.prefix_sharing or used.late_entry):
        return "prefix sharing and late entry are off"
    target = sweep.scope.target
    if not SITES[target.site].packs:
        return f"target.site={target.site!r} is written inside a block"
    if target.alters:
        changes = {
            "corrupt": target.corrupt,
            "soft_prompt": target.soft_prompt,
            "write: cut": target.cut,
            "every_step": target.every_step,
        }
        return f"target.{next(name for name, used in changes.items() if used)} applies to whole prompts"
    if not sweep.target.supports("causal"):
        return f"the tokens of a prompt of {sweep.target.name} see those after them"
    if not sweep.target.supports("packing"):
        return f"the blocks of {sweep.target.family} cannot be run on segments of a sequence"
    return "each decoded token reads its prompt again"


def _held(planned: Plan, step: Step) -> str:
    """Say whether rows that decode share the keys and values of a prefix."""
    why = why_copied(planned.sweep, planned.optimisations, step.cells)
    if why:
        return f"decoding: each row copies the prefix's keys and values, since {why}"
    return "decoding: all rows share the prefix's keys and values"


def _describe(info: ModelInfo) -> str:
    where = info.device if info.engine == TRANSFORMERS else f"{info.engine}, {info.device}"
    return f"{info.name} ({info.n_layers} blocks, d_model {info.d_model}, {info.dtype} on {where})"


def size_text(size: int) -> str:
    """Return a number of bytes as text, in the largest unit that it reaches."""
    return next((f"{size / unit:.3g} {name}" for unit, name in _UNITS if size >= unit), f"{size} bytes")


def _add_step(branch: Any, planned: Plan, number: int, step: Step) -> None:
    from rich.text import Text

    carried = f", {len(step.carried)} states carried in" if len(step.carried) else ""
    node = branch.add(Text(f"{number + 1} {step.context}{carried}"))
    for source in step.sources:
        size = f"{len(source.prompts)} prompts x {source_width(planned, source)} tokens"
        node.add(Text(f"source: {size} through {source.depth} blocks -> {len(source.states)} states"))
    if step.prefix:
        node.add(Text(f"prefix: {len(step.prefix)} tokens, run once for all steps that begin so"))
        if planned.sweep.scope.readout.decodes:
            node.add(Text(_held(planned, step)))
    for target in step.targets:
        if target.layout is None:
            width = target_width(planned, step, target)
            node.add(Text(f"target: {len(target.cells)} rows x {width} tokens"))
            continue
        n_trunks = int((~target.layout.is_branch).sum())
        only = replace(step, sources=(), targets=(target,), prefix=())
        blocks = count_step(planned, only).target_blocks
        size = f"{target.layout.n_tokens} tokens, {blocks} tokens x blocks"
        node.add(Text(f"target: {len(target.cells)} cells and {n_trunks} clean prompts packed into {size}"))
