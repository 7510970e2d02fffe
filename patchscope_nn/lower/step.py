"""Lowers a whole step of a plan to its `StepProgram`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchscope_nn.body.program import PrefixProgram, Read, SitePath, SourceProgram, StepProgram
from patchscope_nn.lower.rows import batch_of, by_layer, options_of, target_rows
from patchscope_nn.lower.segments import target_segments
from patchscope_nn.lower.written import WrittenStates
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.plan import Plan, SourcePass, State, Step
from patchscope_nn.spec import SITES


def lower(
    plan: Plan,
    step: Step,
    *,
    source: Model,
    target: Model,
    mapping: ResolvedMapping,
    states: Mapping[State, Any],
    prefix: Any = None,
    keeps_prefix: bool = False,
) -> StepProgram:
    """Return the program of a step.

    Args:
        plan: The plan.
        step: One of its steps.
        source: M.
        target: M*.
        mapping: f.
        states: The states that earlier steps kept; `step.carried` names those that this step uses.
        prefix: The keys and values of the step's prefix, if an earlier step has computed them.
        keeps_prefix: True if the step returns those of its prefix, for later steps.
    """
    scope, numbers = plan.sweep.scope, step.numbers
    written = WrittenStates(plan, numbers)
    # In a fused step, both sides are rows of one batch and are padded to the same width.
    width = _fused_width(plan, step) if step.context == "fused" else 0
    targets = [
        target_rows(plan, [step.cells[cell] for cell in target_pass.cells], written, target, width)
        if target_pass.layout is None
        else target_segments(
            plan, [step.cells[cell] for cell in target_pass.cells], target_pass.layout, written, target
        )
        for target_pass in step.targets
    ]
    return {
        "sources": [_source(plan, source_pass, numbers, source.info, width) for source_pass in step.sources],
        "targets": targets,
        "prefix": _prefix(step, target.info, prefix, keeps=keeps_prefix),
        "given": {numbers[state]: states[state].clone() for state in step.carried} | written.given,
        "sums": written.sums,
        "keep": [numbers[state] for state in step.kept],
        "writing": {
            "mapping": mapping.kind,
            "weights": mapping.within(pair for cell in step.cells for pair in plan.sweep.pairs(cell)),
            "mode": scope.target.mode,
            "amount": scope.target.amount,
        },
        "source_site": paths_of(source.info, scope.source.site),
        "target_site": paths_of(target.info, scope.target.site),
    }


def _fused_width(plan: Plan, step: Step) -> int:
    """Return the number of tokens of a step's longest row on either side."""
    sweep = plan.sweep
    sources = (sweep.source_prompts[prompt] for source_pass in step.sources for prompt in source_pass.prompts)
    targets = (sweep.target_prompts[cell.target_prompt] for cell in step.cells)
    return max(len(prompt.ids) for prompt in (*sources, *targets))


def paths_of(info: ModelInfo, site: str) -> SitePath:
    """Return where a site is in a model: the blocks, the part inside a block, and its input or output.

    A site in the residual stream is always the output of a block: the input of block n is the output of
    block n - 1, and layers here are numbered accordingly.
    """
    definition = SITES[site]
    part = info.architecture.part(definition)
    return {
        "blocks": info.architecture.blocks,
        "part": part.path if part else "",
        "end": "output" if definition.in_stream else definition.end,
    }


def _source(
    plan: Plan, source_pass: SourcePass, numbers: Mapping[State, int], info: ModelInfo, width: int
) -> SourceProgram:
    prompts = [plan.sweep.source_prompts[prompt].ids for prompt in source_pass.prompts]
    inputs = batch_of(prompts, info, width)
    width = inputs["input_ids"].shape[1]
    rows = {prompt: row for row, prompt in enumerate(source_pass.prompts)}
    reads: list[tuple[int, Read]] = []
    finals: list[Read] = []
    for state in source_pass.states:
        start = width - len(plan.sweep.source_prompts[state.prompt].ids)
        columns = [start + position for position in state.positions]
        read: Read = {"state": numbers[state], "row": rows[state.prompt], "positions": columns}
        if state.layer is None:
            finals.append({**read, "positions": [column - width for column in columns]})
        else:
            reads.append((state.layer, read))
    # Not for whole passes: some models drop the other tokens before their last blocks.
    lean = plan.optimisations.lean_readout and finals and not source_pass.whole
    keep = max((-read["positions"][-1] for read in finals), default=1)
    return {
        "inputs": inputs,
        "options": options_of(info, keep=keep if lean else None, cache=False),
        "whole": source_pass.whole,
        "reads": by_layer(reads),
        "finals": finals,
    }


def _prefix(step: Step, info: ModelInfo, known: Any, *, keeps: bool) -> PrefixProgram | None:
    """Return the program of the tokens that a step's target prompts begin with; None if there are none."""
    if not step.prefix:
        return None
    options = options_of(info, keep=None, cache=True)
    return {"inputs": batch_of([step.prefix], info, 0), "options": options, "known": known, "kept": keeps}
