"""(f) The floor: only the blocks and tokens that a sweep cannot do without, in as few matrix products as fit.

1. every source prompt once, all its layers, prompts of one length attending together, none padded;
2. the target prompt's tokens before the patched one once; their keys and values are everybody's;
3. the cells, sorted by l*: at block k those with l* < k run, so that a row joins where it was written;
4. in the last block only the tokens that are read; of those the top token and its log-probability;
5. to generate, one token a row and step; a row sees the shared keys and values and its own few; rows that
   ended leave.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from benchmarks.speed.attention import causal
from benchmarks.speed.bare import Bare, Projected
from benchmarks.speed.floor_target import generated, next_tokens
from benchmarks.speed.workloads import Answers, Workload
from patchscope_nn.models import Model


def run(workload: Workload, source: Model, target: Model) -> Answers:
    """Answer a workload's cells."""
    with torch.inference_mode():
        states = read_sources(Bare(source.module), workload)
        bare = Bare(target.module)
        if workload.max_new_tokens:
            return generated(bare, workload, states, target.tokenizer)
        return next_tokens(bare, workload, states)


def read_sources(bare: Bare, workload: Workload) -> torch.Tensor:
    """The mapped states of every source prompt's last token, (n_layers, n_prompts, d_model)."""
    prompts = workload.sources
    wanted = max(cell.layer for cell in workload.cells)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    found = bare.embed.weight.new_empty(wanted + 1, len(prompts), bare.embed.weight.shape[1])
    for batch in _batches(order, [len(prompts[row]) for row in order], most=bare.limits.tokens):
        found[:, batch] = _read(bare, [prompts[row] for row in batch], depth=wanted + 1)
    return workload.mapped(found)


def _batches(order: Sequence[int], sizes: Sequence[int], *, most: int) -> list[list[int]]:
    """Cut prompts, in order, into batches of at most so many tokens."""
    batches: list[list[int]] = [[]]
    filled = 0
    for one, size in zip(order, sizes, strict=True):
        if batches[-1] and filled + size > most:
            batches.append([])
            filled = 0
        batches[-1].append(one)
        filled += size
    return batches


def _read(bare: Bare, prompts: list[tuple[int, ...]], *, depth: int) -> torch.Tensor:
    groups = [(len(list(same)), length) for length, same in itertools.groupby(map(len, prompts))]
    hidden = bare.embed(torch.tensor(list(itertools.chain(*prompts)), device=bare.device))
    angles = bare.angles(torch.cat([torch.arange(len(prompt)) for prompt in prompts]))
    last = torch.tensor([len(prompt) for prompt in prompts], device=bare.device).cumsum(0) - 1

    def attend(given: Projected) -> torch.Tensor:
        whole = len(given.queries) == len(given.keys)
        sizes = [rows * length for rows, length in groups]
        asked = sizes if whole else [rows for rows, _ in groups]
        parts = zip(
            groups,
            given.queries.split(asked),
            given.keys.split(sizes),
            given.values.split(sizes),
            strict=True,
        )
        return torch.cat(
            [
                causal(*(one.unflatten(0, (rows, -1)) for one in each), bare.scale)
                for (rows, _), *each in parts
            ]
        )

    states = []
    for layer in range(depth):
        deepest = layer == depth - 1
        hidden = bare.block(layer, hidden, angles, attend, asked=last if deepest else None)
        states.append(hidden if deepest else hidden[last])
    return torch.stack(states)
