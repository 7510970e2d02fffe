"""A step of a plan as plain values: ints, strings, lists and tensors, which is all that may enter a context.

A body travels to machines that do not have this package, so it never sees a `Cell`, a `Plan` or a tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from patchscope_nn.cells import Cell
from patchscope_nn.layers import EMBED
from patchscope_nn.mappings import Pair, ResolvedMapping
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.plan import Layout, Plan, Segment, SourcePass, State, Step, shares_attention
from patchscope_nn.spec import Choices, Generate, NextToken, read_position

Work = dict[str, Any]


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
        of the states read here; `keep`, those of the states that go out; `prefix`; and `mapping`.
    """
    wanted = [*step.carried, *(state for one in step.sources for state in one.states)]
    numbers = {state: number for number, state in enumerate(wanted)}
    scope = plan.sweep.scope
    # In a fused step both sides are rows of one batch, and so padded to one width.
    width = _fused_width(plan, step) if step.context == "fused" else 0
    return {
        "sources": [_source(plan, one, numbers, source.info, width) for one in step.sources],
        "targets": [
            _target(plan, [step.cells[cell] for cell in one.cells], numbers, target, width)
            if one.layout is None
            else _packed(plan, [step.cells[cell] for cell in one.cells], one.layout, numbers, target)
            for one in step.targets
        ],
        "prefix": _prefix(step, target.info, prefix, keeps=keeps_prefix),
        "carried": {numbers[state]: states[state].clone() for state in step.carried},
        "fresh": [numbers[state] for one in step.sources for state in one.states],
        "keep": [numbers[state] for state in step.kept],
        "mapping": [mapping.kind, mapping.within(filter(None, map(pair_of, step.cells)))],
        "source_paths": _paths(source.info, scope.source.site),
        "target_paths": _paths(target.info, scope.target.site),
    }


def _fused_width(plan: Plan, step: Step) -> int:
    """The tokens of a step's longest row on either side."""
    sweep = plan.sweep
    sources = (sweep.source_prompts[prompt] for one in step.sources for prompt in one.prompts)
    targets = (sweep.target_prompts[cell.target_prompt] for cell in step.cells)
    return max(len(prompt.ids) for prompt in (*sources, *targets))


def _paths(info: ModelInfo, site: str) -> dict[str, str]:
    """Where a site is, as text: the list of blocks, and the part inside one (empty for its output)."""
    part = "" if site == "residual" else getattr(info.architecture, site)
    return {"blocks": info.architecture.blocks, "part": part or ""}


def _batch(rows: Sequence[tuple[int, ...]], info: ModelInfo, width: int) -> Work:
    """Left-padded ids, their mask and positions, as keyword arguments of the model."""
    width = max(width, *(len(row) for row in rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in info.architecture.arguments:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs


def _by_layer(entries: Iterable[tuple[int, Any]]) -> list[list[Any]]:
    """Entries grouped by layer, in the order a forward reaches them (the embedding's -1 first)."""
    groups: dict[int, list[Any]] = {}
    for layer, entry in entries:
        groups.setdefault(layer, []).append(entry)
    return [[layer, groups[layer]] for layer in sorted(groups)]


def _source(plan: Plan, one: SourcePass, numbers: Mapping[State, int], info: ModelInfo, width: int) -> Work:
    prompts = [plan.sweep.source_prompts[prompt].ids for prompt in one.prompts]
    inputs = _batch(prompts, info, width)
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
    keep = width - min((positions[-1] for _, _, positions in finals), default=width - 1)
    return {
        "inputs": inputs,
        "options": _options(info, keep=None if one.whole else keep, cache=False),
        "whole": one.whole,
        "reads": _by_layer(reads),
        "finals": [[number, row, positions[-1] - width] for number, row, positions in finals],
    }


def _options(info: ModelInfo, *, keep: int | None, cache: bool) -> Work:
    """`keep` is how many positions, from the end, are unembedded; None for all."""
    options: Work = {"use_cache": cache} if info.architecture.caches else {}
    if keep is not None and "logits_to_keep" in info.architecture.arguments:
        options["logits_to_keep"] = keep
    return options


def _target(
    plan: Plan, cells: Sequence[Cell], numbers: Mapping[State, int], target: Model, width: int
) -> Work:
    """A target pass as rows of a padded batch."""
    prompts = [plan.sweep.target_prompts[cell.target_prompt].ids for cell in cells]
    inputs = _batch(prompts, target.info, width)
    padded = inputs["input_ids"].shape[1]
    writes = [
        (
            cell.target_layer,
            _write(
                cell, row, [padded - len(prompts[row]) + at for at in cell.target_positions], numbers, row
            ),
        )
        for row, cell in enumerate(cells)
        if cell.target_layer is not None
    ]
    readout = _readout(plan, cells, numbers, target)
    readout["mask"] = inputs["attention_mask"]
    asked = plan.sweep.scope.readout
    positions = [read_position(asked, len(prompt)) - len(prompt) for prompt in prompts]
    decodes = plan.sweep.scope.readout.decodes
    return {
        "layout": None,
        "cells": len(cells),
        "inputs": inputs,
        "options": _options(
            target.info, keep=-min(positions) if plan.optimisations.lean_readout else None, cache=decodes
        ),
        "writes": _by_layer(writes),
        "rereads": decodes and not target.info.architecture.caches,
        "positions": positions,
        "readout": readout,
    }


def _write(cell: Cell, row: int, positions: list[int], numbers: Mapping[State, int], place: int) -> list[Any]:
    """[state, row, positions, (l, l*), seed of a random state or None, cell] of one write."""
    if cell.source_prompt is None or cell.source_positions is None:
        raise ValueError("a cell that is written has a source")
    state = State(cell.source_prompt, cell.source_positions, cell.source_layer)
    seed = cell.seed if cell.control == "random" else None
    return [numbers[state], row, positions, pair_of(cell), seed, place]


def pair_of(cell: Cell) -> Pair | None:
    """(l, l*) of a cell; None where nothing is written."""
    layer, target_layer = cell.source_layer, cell.target_layer
    return None if layer is None or target_layer is None else (layer, target_layer)


def _packed(
    plan: Plan, cells: Sequence[Cell], layout: Layout, numbers: Mapping[State, int], target: Model
) -> Work:
    """A target pass as segments of one sequence."""
    segments, info = layout.segments, target.info
    ids = [
        token
        for segment in segments
        for token in plan.sweep.target_prompts[segment.prompt].ids[segment.first : segment.last]
    ]
    positions = [at for segment in segments for at in range(segment.first, segment.last)]
    inputs: Work = {"input_ids": torch.tensor([ids])}
    if "position_ids" in info.architecture.arguments:
        inputs["position_ids"] = torch.tensor([positions])
    writes = []
    for place, cell in enumerate(cells):
        if cell.target_layer is not None:
            branch = segments[layout.of_cell[place]]
            tokens = [branch.at(at) for at in cell.target_positions]
            writes.append((cell.target_layer, _write(cell, 0, tokens, numbers, place)))
    readout = _readout(plan, cells, numbers, target)
    read = [_read_token(plan, cell, segments[at]) for cell, at in zip(cells, layout.of_cell, strict=True)]
    decodes = plan.sweep.scope.readout.decodes
    if decodes:
        readout["mask"] = torch.ones(len(cells), len(plan.sweep.target_prompts[cells[0].target_prompt].ids))
        readout["mask"] = readout["mask"].long()
    options: Work = {"use_cache": True}
    if plan.optimisations.lean_readout and "logits_to_keep" in info.architecture.arguments:
        options["logits_to_keep"] = torch.tensor(read)
    own = (
        _own(layout)
        if shares_attention(plan.sweep, plan.optimisations, cells, prefix=layout.prefix)
        else None
    )
    return {
        "cells": len(cells),
        "inputs": inputs,
        "options": options,
        "writes": _by_layer(writes),
        "readout": readout,
        "layout": {
            "depth": layout.depth,
            "entering": layout.running(EMBED),
            "bases": _bases(segments),
            "prefix": layout.prefix,
            "n_tokens": layout.n_tokens,
            "own": own,
            "allowed": None if own is not None else _allowed(layout),
            "key_positions": torch.tensor([*range(layout.prefix), *positions]),
            "windows": list(info.architecture.windows),
            "tuples": info.architecture.gives_tuples,
            "names": [name for name in info.architecture.block_arguments if name != "self"],
            "read": read,
            "rows": _rows(layout, readout["mask"].shape[1]) if decodes else None,
        },
    }


def _read_token(plan: Plan, cell: Cell, segment: Segment) -> int:
    whole = len(plan.sweep.target_prompts[cell.target_prompt].ids)
    return segment.at(read_position(plan.sweep.scope.readout, whole))


def _bases(segments: Sequence[Segment]) -> dict[int, list[int]]:
    """By layer, for each token that joins after it, where the clean token it stands for is; -1 for none."""
    found: dict[int, list[int]] = {}
    for segment in segments:
        if segment.enters > EMBED:
            trunk = None if segment.trunk is None else segments[segment.trunk]
            found.setdefault(segment.enters, []).extend(
                -1 if trunk is None or at >= trunk.last else trunk.at(at)
                for at in range(segment.first, segment.last)
            )
    return found


def _allowed(layout: Layout) -> torch.Tensor:
    """(n_tokens, n_prefix + n_tokens): whether a token attends to another."""
    prefix, total = layout.prefix, layout.n_tokens
    allowed = torch.zeros(total, prefix + total, dtype=torch.bool)
    allowed[:, :prefix] = True
    for segment in layout.segments:
        size = segment.last - segment.first
        rows = slice(segment.offset, segment.offset + size)
        own = prefix + segment.offset
        allowed[rows, own : own + size] = torch.ones(size, size, dtype=torch.bool).tril()
        if segment.trunk is not None:
            trunk = layout.segments[segment.trunk]
            start = prefix + trunk.offset
            allowed[rows, start : start + min(segment.first, trunk.last) - trunk.first] = True
    return allowed


def _own(layout: Layout) -> torch.Tensor:
    """(n_tokens, n_own): which tokens of the sequence, behind the prefix, each sees; -1 for none."""
    seen = []
    for segment in layout.segments:
        before: list[int] = []
        if segment.trunk is not None:
            trunk = layout.segments[segment.trunk]
            before = list(range(trunk.offset, trunk.offset + min(segment.first, trunk.last) - trunk.first))
        seen += [
            [*before, *range(segment.offset, segment.offset + at + 1)]
            for at in range(segment.last - segment.first)
        ]
    most = max(map(len, seen))
    return torch.tensor([one + [-1] * (most - len(one)) for one in seen])


def _rows(layout: Layout, width: int) -> Work:
    """Where the tokens of each cell's whole prompt stand among prefix and segments: (n_cells, n_tokens).

    `own` follows the cell's branch, `clean` its trunk; `enters` tells from which block on it is the branch.
    """
    own, clean, enters = [], [], []
    for at in layout.of_cell:
        segment = layout.segments[at]
        trunk = segment if segment.trunk is None else layout.segments[segment.trunk]
        shared = list(range(layout.prefix))
        of_trunk = [*shared, *(layout.prefix + trunk.at(one) for one in range(layout.prefix, width))]
        of_branch = [layout.prefix + segment.at(one) for one in range(segment.first, width)]
        clean.append(of_trunk)
        own.append([*of_trunk[: segment.first], *of_branch])
        enters.append(segment.enters)
    return {"own": torch.tensor(own), "clean": torch.tensor(clean), "enters": torch.tensor(enters)}


def _prefix(step: Step, info: ModelInfo, known: Any, *, keeps: bool) -> Work | None:
    """How to run what a step's target prompts begin with, or its keys and values where they are known."""
    if not step.prefix:
        return None
    options = _options(info, keep=1, cache=True)
    return {"inputs": _batch([step.prefix], info, 0), "options": options, "known": known, "kept": keeps}


def _readout(plan: Plan, cells: Sequence[Cell], numbers: Mapping[State, int], target: Model) -> Work:
    readout, resolved = plan.sweep.scope.readout, plan.sweep.resolved
    arguments = target.info.architecture.arguments
    work: Work = {
        "name": readout.name,
        "numbered": "position_ids" in arguments,
        "extra": {"logits_to_keep": 1} if "logits_to_keep" in arguments else {},
    }
    if isinstance(readout, NextToken):
        before = [
            numbers[State(cell.reference[0], (cell.reference[1],), None)]
            for cell in cells
            if cell.reference is not None
        ]
        work |= {
            "top_k": readout.top_k,
            "references": [list(resolved[cell.row].reference_ids) for cell in cells],
            "before": before,
            "from_source": readout.reference == "source",
        }
    elif isinstance(readout, Generate):
        work |= {
            "max_new_tokens": readout.max_new_tokens,
            "eos": list(eos_ids(target)),
            "stops": list(stop_ids(target.tokenizer, readout.stop) if readout.stop else ()),
            "temperature": readout.temperature,
            "seeds": [cell.seed for cell in cells],
            "leaving": plan.optimisations.early_leaving and target.info.architecture.caches,
        }
    elif isinstance(readout, Choices):
        continuations = [[list(ids) for ids in resolved[cell.row].continuations] for cell in cells]
        work |= {"continuations": continuations}
    return work


def eos_ids(model: Model) -> tuple[int, ...]:
    """The ids that end a text: those of the generation config, and the tokenizer's."""
    config = getattr(model.module, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    return tuple(dict.fromkeys(one for one in [*ids, model.tokenizer.eos_token_id] if one is not None))


@functools.lru_cache(maxsize=32)
def stop_ids(tokenizer: Any, stop: str) -> tuple[int, ...]:
    """The tokens whose text holds a stop string.

    A row that decodes one can stop; a stop string spread over tokens ends no row early, and is cut from the
    text afterwards all the same.
    """
    ids = [[token] for token in range(len(tokenizer))]
    fast = getattr(tokenizer, "backend_tokenizer", None)  # ten times as fast as through transformers
    pieces = (
        fast.decode_batch(ids, skip_special_tokens=False)
        if fast is not None and not tokenizer.clean_up_tokenization_spaces
        else tokenizer.batch_decode(ids)
    )
    return tuple(token for token, piece in enumerate(pieces) if stop in piece)
