"""One step, unpacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchscope_nn.body.program import Work
from patchscope_nn.lower.made import Made
from patchscope_nn.lower.rows import batch_of, by_layer, options_of, target_rows
from patchscope_nn.lower.segments import target_segments
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.plan import Plan, SourcePass, State, Step
from patchscope_nn.spec import SITES


def unpack(
    plan: Plan,
    step: Step,
    *,
    source: Model,
    target: Model,
    mapping: ResolvedMapping,
    states: Mapping[State, Any],
    prefix: Any = None,
    keeps_prefix: bool = False,
) -> Work:
    """Everything one context needs, in plain values.

    Args:
        plan: The plan.
        step: One of its steps.
        source: M.
        target: M*.
        mapping: f.
        states: The states carried in, by what they are.
        prefix: The keys and values of the step's prefix, where an earlier step has run it.
        keeps_prefix: Whether a later step may use this one's.

    Returns:
        `sources` and `targets`, one entry for each pass; `carried`, tensors by number; `fresh`, the numbers
        of the states read here; `sums`, states that are made of others; `keep`, the numbers of the states
        that go out; `prefix`; and `how` states are mapped and written.
    """
    numbers = numbered(step)
    scope = plan.sweep.scope
    made = Made(plan, numbers)
    # In a fused step both sides are rows of one batch, and so padded to one width.
    width = _fused_width(plan, step) if step.context == "fused" else 0
    return {
        "sources": [_source(plan, one, numbers, source.info, width) for one in step.sources],
        "targets": [
            target_rows(plan, [step.cells[cell] for cell in one.cells], made, target, width)
            if one.layout is None
            else target_segments(plan, [step.cells[cell] for cell in one.cells], one.layout, made, target)
            for one in step.targets
        ],
        "prefix": _prefix(step, target.info, prefix, keeps=keeps_prefix),
        "carried": {numbers[state]: states[state].clone() for state in step.carried} | made.given,
        "sums": made.sums,
        "fresh": [numbers[state] for one in step.sources for state in one.states],
        "keep": [numbers[state] for state in step.kept],
        "how": {
            "mapping": [
                mapping.kind,
                mapping.within(pair for cell in step.cells for pair in plan.sweep.pairs(cell)),
            ],
            "mode": scope.target.mode,
            "amount": scope.target.amount,
        },
        "source_paths": paths_of(source.info, scope.source.site),
        "target_paths": paths_of(target.info, scope.target.site),
    }


def numbered(step: Step) -> dict[State, int]:
    """The numbers of the states that a step's context knows from its source passes, or is given."""
    wanted = [*step.carried, *(state for one in step.sources for state in one.states)]
    return {state: number for number, state in enumerate(wanted)}


def _fused_width(plan: Plan, step: Step) -> int:
    """The tokens of a step's longest row on either side."""
    sweep = plan.sweep
    sources = (sweep.source_prompts[prompt] for one in step.sources for prompt in one.prompts)
    targets = (sweep.target_prompts[cell.target_prompt] for cell in step.cells)
    return max(len(prompt.ids) for prompt in (*sources, *targets))


def paths_of(info: ModelInfo, site: str) -> dict[str, str]:
    """Where a site is, as text: the list of blocks, the part inside one (empty for the block), and its end.

    The input of a block is the output of the one below, whose number it has here.
    """
    found = SITES[site]
    part = info.architecture.part(found)
    return {
        "blocks": info.architecture.blocks,
        "part": part.path if part else "",
        "end": "output" if found.in_stream else found.end,
    }


def _source(plan: Plan, one: SourcePass, numbers: Mapping[State, int], info: ModelInfo, width: int) -> Work:
    prompts = [plan.sweep.source_prompts[prompt].ids for prompt in one.prompts]
    inputs = batch_of(prompts, info, width)
    width = inputs["input_ids"].shape[1]
    rows = {prompt: row for row, prompt in enumerate(one.prompts)}
    places = {prompt: width - len(plan.sweep.source_prompts[prompt].ids) for prompt in one.prompts}
    reads: list[tuple[int, list[Any]]] = []
    finals: list[list[Any]] = []
    for state in one.states:
        entry = [numbers[state], rows[state.prompt], [places[state.prompt] + at for at in state.positions]]
        if state.layer is None:
            finals.append(entry)
        else:
            reads.append((state.layer, entry))
    # Some models cut tokens off before their last blocks where few are unembedded.
    lean = plan.optimisations.lean_readout and finals and not one.whole
    keep = width - min((positions[-1] for _, _, positions in finals), default=width - 1)
    return {
        "inputs": inputs,
        "options": options_of(info, keep=keep if lean else None, cache=False),
        "whole": one.whole,
        "reads": by_layer(reads),
        "finals": [[number, row, positions[-1] - width] for number, row, positions in finals],
    }


def _prefix(step: Step, info: ModelInfo, known: Any, *, keeps: bool) -> Work | None:
    """How to run what a step's target prompts begin with, or its keys and values where they are known."""
    if not step.prefix:
        return None
    options = options_of(info, keep=None, cache=True)
    return {"inputs": batch_of([step.prefix], info, 0), "options": options, "known": known, "kept": keeps}
