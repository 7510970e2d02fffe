"""A plan as a tree that a person can read before running it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from patchscope_nn.models import ModelInfo
from patchscope_nn.plan.passes import Plan, Step
from patchscope_nn.spec import Generate

_SHOWN = 6


def render_plan(plan: Plan) -> str:
    """Draw a plan: its models, cells and counts, and the passes of its first contexts.

    Args:
        plan: The plan.

    Returns:
        Lines of text.
    """
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(f"plan {plan.digest}"))
    for line in _facts(plan):
        tree.add(Text(line))
    contexts = Counter(step.context for step in plan.steps)
    counted = ", ".join(f"{count} {context}" for context, count in contexts.items()) or "none"
    branch = tree.add(Text(f"contexts: {counted}"))
    for number, step in enumerate(plan.steps[:_SHOWN]):
        _add_step(branch, plan, number, step)
    if len(plan.steps) > _SHOWN:
        branch.add(Text(f"... and {len(plan.steps) - _SHOWN} more like these"))
    console = Console(file=io.StringIO(), width=160, no_color=True)
    console.print(tree)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # the StringIO given above
    return "\n".join(line.rstrip() for line in lines)


def _facts(plan: Plan) -> Iterator[str]:
    sweep, totals = plan.sweep, plan.totals()
    kinds = Counter(cell.control or "patched" for cell in plan.cells)
    readout = sweep.scope.readout
    more = f", then up to {readout.max_new_tokens} each" if isinstance(readout, Generate) else ""
    yield f"M:  {_describe(sweep.source)}"
    yield f"M*: {'the same' if sweep.target is sweep.source else _describe(sweep.target)}"
    yield f"cells: {totals['cells']} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"
    yield (
        f"source: {totals['source_passes']} passes, {totals['source_rows']} prompts, "
        f"{totals['source_tokens']} tokens with padding, {totals['states']} states read"
    )
    yield (
        f"target: {totals['target_passes']} passes, {totals['target_rows']} rows, "
        f"{totals['target_tokens']} tokens{more}"
    )
    yield from _saved(plan, totals)
    yield f"readout: {readout.name}; a pass holds at most {plan.max_rows} rows and {plan.max_tokens} tokens"
    reads = sum(0 in (cell.source_positions or ()) for cell in plan.cells)
    writes = sum(0 in cell.target_positions for cell in plan.cells if cell.target_layer is not None)
    if reads + writes:
        yield (
            f"note: {reads} cells read and {writes} write position 0, in most models an attention sink, "
            "whose state is huge and says little"
        )


def _saved(plan: Plan, totals: dict[str, int]) -> Iterator[str]:
    """What the plan runs, beside what running every cell by itself would."""
    whole = sum(len(plan.sweep.target_prompts[cell.target_prompt].ids) for cell in plan.cells)
    depth = plan.sweep.target.n_layers
    tokens = _share(totals["target_tokens"], whole)
    blocks = _share(totals["target_blocks"], whole * depth)
    yield f"beside every cell alone: target tokens {tokens}, tokens x blocks {blocks}"
    packed = [one.layout is not None for step in plan.steps for one in step.targets]
    if plan.optimisations.packing and not any(packed) and plan.steps and plan.steps[0].context != "fused":
        yield f"note: not packed: {_why(plan)}; every cell is a row of a padded batch"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / max(whole, 1):.1f} %)"


def _why(plan: Plan) -> str:
    if plan.sweep.scope.target.site != "residual":
        return f"target.site={plan.sweep.scope.target.site!r} is written inside a block"
    return f"the blocks of {plan.sweep.target.family} cannot be run on segments"


def _describe(info: ModelInfo) -> str:
    return f"{info.name} ({info.n_layers} blocks, d_model {info.d_model}, {info.dtype} on {info.device})"


def _add_step(branch: Any, plan: Plan, number: int, step: Step) -> None:
    from rich.text import Text

    carried = f", {len(step.carried)} states carried in" if step.carried else ""
    node = branch.add(Text(f"{number + 1} {step.context}{carried}"))
    for one in step.sources:
        size = f"{len(one.prompts)} prompts x {plan.source_width(one)} tokens"
        node.add(Text(f"source: {size} -> {len(one.states)} states"))
    if step.prefix:
        node.add(Text(f"prefix: {step.prefix[1]} tokens, once"))
    for target in step.targets:
        if target.layout is None:
            node.add(Text(f"target: {len(target.cells)} rows x {plan.target_width(target)} tokens"))
        else:
            trunks = sum(segment.cell is None for segment in target.layout.segments)
            size = f"{target.layout.n_tokens} tokens, {plan.target_blocks(target)} token-blocks"
            node.add(Text(f"target: {len(target.cells)} cells and {trunks} clean prompts packed into {size}"))
