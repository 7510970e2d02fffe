"""(b) and (c): nnsight without this package; a trace for each cell, and one for many rows.

In a generation, nnsight's `.output` is the block's first one: that of the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.speed.workloads import Answers, Cell, Said, Workload, text_of
from patchscope_nn.models import Model

#: The most rows of a trace: with more, memory grows, and time does not shrink.
_ROWS = 64


def run_cells(workload: Workload, source: Model, target: Model) -> Answers:
    """(b): for each cell, a trace of the source that reads, and one of the target that is written."""
    with torch.no_grad():
        return {cell: _cell(workload, cell, source.traced, target) for cell in workload.cells}


def _cell(workload: Workload, cell: Cell, source: Any, target: Model) -> Said:
    with source.trace(torch.tensor([workload.sources[cell.row]], device=source.device)) as tracer:
        state = source.model.layers[cell.layer].output[0, -1].clone().save()
        tracer.stop()
    state = workload.mapped(state)
    model, ids = target.traced, torch.tensor([workload.target], device=target.module.device)
    if workload.max_new_tokens:
        with model.generate(ids, max_new_tokens=workload.max_new_tokens, do_sample=False) as tracer:
            model.model.layers[cell.target_layer].output[0, workload.position] = state
            found = tracer.result.save()
        return Said(text_of(found[0, ids.shape[1] :].tolist(), workload, target.tokenizer))
    with model.trace(ids):
        model.model.layers[cell.target_layer].output[0, workload.position] = state
        logprobs = model.lm_head.output[0, -1].log_softmax(-1).save()
    logprob, token = logprobs.max(-1)
    return Said(int(token), float(logprob))


def run_rows(workload: Workload, source: Model, target: Model) -> Answers:
    """(c): a trace for each source prompt, of all layers; then for each l* one with a row for each state."""
    answers: Answers = {}
    with torch.no_grad():
        states = [_states(source.traced, ids) for ids in workload.sources]
        for cells in _batches(workload):
            written = torch.stack([states[cell.row][cell.layer] for cell in cells])
            said = _rows(workload, cells[0].target_layer, workload.mapped(written), target)
            answers.update(zip(cells, said, strict=True))
    return answers


def _batches(workload: Workload) -> Iterator[list[Cell]]:
    """The cells of one l* together; where each l* is crossed with every l, those of one source prompt."""

    def together(cell: Cell) -> tuple[int, int]:
        return cell.target_layer, 0 if workload.target_layers is None else cell.row

    for _, group in itertools.groupby(sorted(workload.cells, key=together), together):
        cells = list(group)
        yield from (cells[first : first + _ROWS] for first in range(0, len(cells), _ROWS))


def _states(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """The last token's state after every block, (n_layers, d_model)."""
    with model.trace(torch.tensor([ids], device=model.device)) as tracer:
        states = torch.stack([block.output[0, -1] for block in model.model.layers]).save()
        tracer.stop()
    return states


def _rows(workload: Workload, layer: int, states: torch.Tensor, target: Model) -> list[Said]:
    model = target.traced
    ids = torch.tensor([workload.target], device=target.module.device).expand(len(states), -1)
    if workload.max_new_tokens:
        with model.generate(ids, max_new_tokens=workload.max_new_tokens, do_sample=False) as tracer:
            model.model.layers[layer].output[:, workload.position] = states
            found = tracer.result.save()
        said = found[:, ids.shape[1] :].tolist()
        return [Said(text_of(one, workload, target.tokenizer)) for one in said]
    with model.trace(ids, logits_to_keep=1):
        model.model.layers[layer].output[:, workload.position] = states
        logprobs = model.lm_head.output[:, -1].log_softmax(-1).save()
    top, tokens = logprobs.max(-1)
    return [Said(*one) for one in zip(tokens.tolist(), top.tolist(), strict=True)]
