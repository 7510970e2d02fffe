"""Lowers a whole step of a plan to its `StepProgram`."""

from __future__ import annotations

import numpy as np
import torch

from patchscope_nn._util.ragged import Ragged
from patchscope_nn.body.program import (
    PackedProgram,
    Places,
    PrefixProgram,
    RowsProgram,
    SitePath,
    SourceProgram,
    StepProgram,
)
from patchscope_nn.lower.rows import batch_of, options_of, target_rows
from patchscope_nn.lower.segments import target_segments
from patchscope_nn.lower.states import StateTable
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.plan import Plan, SourcePass, Step
from patchscope_nn.spec import SITES
from patchscope_nn.sweep.vectors import load_soft_prompt


def lower(
    plan: Plan,
    step: Step,
    *,
    source: Model,
    target: Model,
    mapping: ResolvedMapping,
    keeps_prefix: bool = False,
) -> StepProgram:
    """Return the program of a step. It lacks what earlier steps hand on, which `run_steps` adds.

    Args:
        plan: The plan.
        step: One of its steps.
        source: M.
        target: M*.
        mapping: f.
        keeps_prefix: True if the step returns those of its prefix, for later steps.
    """
    sweep, scope = plan.sweep, plan.sweep.scope
    table = StateTable(plan, step)
    # In a fused step, both sides are rows of one batch and are padded to the same width.
    width = _fused_width(plan, step) if step.context == "fused" else 0
    targets: list[RowsProgram | PackedProgram] = []
    for cells, layout in step.targets:
        block = step.cells.take(cells)
        targets.append(
            target_rows(plan, block, table, target, width)
            if layout is None
            else target_segments(plan, block, layout, table, target)
        )
    writes = sweep.writes(step.cells)
    pairs = np.unique(np.stack([writes.layer, writes.mapped], axis=1), axis=0).tolist()
    final = sweep.states.is_final(step.kept)
    soft = scope.target.soft_prompt
    return {
        "sources": [_source(plan, source_pass, source.info, width) for source_pass in step.sources],
        "targets": targets,
        "prefix": _prefix(plan, step, keeps=keeps_prefix),
        "given": table.vectors,
        "given_finals": None,
        "sums": table.sums,
        "soft": load_soft_prompt(soft) if soft else None,
        "keep": torch.from_numpy(table.rows(step.kept[~final])),
        "keep_finals": torch.from_numpy(table.finals(step.kept[final])),
        "writing": {
            "mapping": mapping.kind,
            "weights": mapping.within((layer, written) for layer, written in pairs),
            "mode": scope.target.mode,
            "amount": scope.target.amount,
        },
        "source_site": paths_of(source.info, scope.source.site),
        "target_site": paths_of(target.info, scope.target.site),
    }


def _fused_width(plan: Plan, step: Step) -> int:
    """Return the number of tokens of a step's longest row on either side."""
    sources = np.concatenate([source_pass.prompts for source_pass in step.sources])
    longest_source = plan.sweep.source_tokens.counts[sources].max(initial=0)
    return max(int(longest_source), int(plan.sweep.target_tokens.counts[step.cells.target_prompt].max()))


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
        "terms": info.architecture.terms if definition.in_stream else 1,
        "argument": info.architecture.states_argument,
    }


def _source(plan: Plan, source_pass: SourcePass, info: ModelInfo, width: int) -> SourceProgram:
    sweep, numbers, cells = plan.sweep, plan.sweep.states, plan.sweep.cells
    inputs = batch_of(sweep.source_tokens, source_pass.prompts, info, width)
    width = inputs["input_ids"].shape[1]
    origins, layers = numbers.origin(source_pass.states), numbers.layer(source_pass.states)
    row_of = np.zeros(len(sweep.source_tokens), np.int64)
    row_of[source_pass.prompts] = np.arange(len(source_pass.prompts))
    positions, index = cells.origin_positions.take(origins)
    prompts = cells.origin_source[origins[index]]
    rows, columns = row_of[prompts], positions + width - sweep.source_tokens.counts[prompts]

    def places(layer: int, shift: int = 0) -> Places:
        chosen = layers[index] == layer
        return {
            "rows": torch.from_numpy(rows[chosen]),
            "positions": torch.from_numpy(columns[chosen] + shift),
        }

    distinct = np.unique(layers).tolist()
    finals = places(info.n_layers, -width) if info.n_layers in distinct else None
    # Not for whole passes: some models drop the other tokens before their last blocks.
    lean = plan.optimisations.lean_readout and finals is not None and not source_pass.whole
    keep = -int(finals["positions"].min()) if finals is not None else 1
    return {
        "inputs": inputs,
        "options": options_of(info, keep=keep if lean else None, cache=False),
        "whole": source_pass.whole,
        "reads": {layer: places(layer) for layer in distinct if layer < info.n_layers},
        "finals": finals,
    }


def _prefix(plan: Plan, step: Step, *, keeps: bool) -> PrefixProgram | None:
    """Return the program of the tokens that a step's target prompts begin with; None if there are none."""
    if not step.prefix:
        return None
    info = plan.sweep.target
    inputs = batch_of(Ragged([step.prefix]), np.zeros(1, np.int64), info, 0)
    options = options_of(info, keep=None, cache=True)
    return {"inputs": inputs, "options": options, "known": None, "kept": keeps}
