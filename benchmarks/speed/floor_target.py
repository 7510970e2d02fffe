"""The floor's target side: one clean prompt, and the cells that branch off it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.speed.attention import Own, Shared, branching, causal
from benchmarks.speed.bare import Bare, Projected
from benchmarks.speed.workloads import Answers, Cell, Said, Workload, text_of

#: The most cells that are held at once.
CELLS = 8192
#: Rows that have ended are taken out once they are one in so many.
_ENDED = 16


class Trunk:
    """The clean target prompt, run once, as far as any cell needs it.

    Attributes:
        start: The patched position, from the left.
        own: How many tokens are a cell's own: from the patched one on.
        shared: For each block the keys and values of the tokens before the patched one.
        own_clean: For each block those of the tokens from there on, as one row.
        states: For each block the clean states after it of the tokens from the patched one on,
            (n_own, d_model); of the last block, that of the last token only.
    """

    def __init__(self, bare: Bare, workload: Workload) -> None:
        self.start, self.own = len(workload.target) + workload.position, -workload.position
        self.shared: list[Shared] = []
        self.own_clean: list[Own] = []
        self.states: list[torch.Tensor] = []
        # A patched token's clean states are needed only where others follow it, or decoding goes on.
        count = len(workload.target) if self.own > 1 or workload.max_new_tokens else self.start
        hidden = bare.embed(torch.tensor(workload.target[:count], device=bare.device))
        angles = bare.angles(torch.arange(count))

        def attend(given: Projected) -> torch.Tensor:
            self._keep(given.keys, given.values)
            return causal(given.queries[None], given.keys[None], given.values[None], bare.scale)

        last = bare.depth - 1
        for layer in range(last):
            hidden = bare.block(layer, hidden, angles, attend)
            self.states.append(hidden[self.start :])
        if self.own > 1:
            self.states.append(bare.block(last, hidden, angles, attend, asked=slice(-1, None)))
        else:
            self._keep(*bare.keys_values(last, bare.blocks[last].input_layernorm(hidden), *angles))

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        keys, values = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
        self.shared.append(Shared(keys[:, : self.start], values[:, : self.start]))
        self.own_clean.append(Own(keys[None, :, self.start :], values[None, :, self.start :]))


def next_tokens(bare: Bare, workload: Workload, states: torch.Tensor) -> Answers:
    """The top token of every cell and its log-probability. `states` is what `read_sources` gives."""
    trunk = Trunk(bare, workload)
    answers: Answers = {}
    for cells in _cut(_by_entry(workload.cells), CELLS):
        ids, logprobs = [], []
        for rows in _entered(bare, trunk, cells, states).split(bare.limits.tokens):
            top, logprob = bare.next_token(rows)
            ids.append(top)
            logprobs.append(logprob)
        said = zip(torch.cat(ids).tolist(), torch.cat(logprobs).tolist(), strict=True)
        answers.update({cell: Said(*one) for cell, one in zip(cells, said, strict=True)})
    return answers


def _by_entry(cells: Sequence[Cell]) -> list[Cell]:
    """Cells by where they enter: those of a lower l* run more blocks."""
    return sorted(cells, key=lambda cell: (cell.target_layer, cell.row, cell.layer))


def _cut(cells: list[Cell], most: int) -> Iterator[list[Cell]]:
    """Parts of at most so many cells, each spread over all l*, so that every block has work for many rows."""
    parts = -(-len(cells) // most)
    return (cells[part::parts] for part in range(parts))


def _starting(trunk: Trunk, cells: Sequence[Cell], states: torch.Tensor) -> torch.Tensor:
    """What each cell enters with, (n_cells, n_own, d_model): its mapped state, then clean tokens."""
    written = states[[cell.layer for cell in cells], [cell.row for cell in cells]][:, None]
    if trunk.own == 1:
        return written
    after = torch.stack([state[1 - trunk.own :] for state in trunk.states])
    return torch.cat([written, after[[cell.target_layer for cell in cells]]], 1)


def _entered(bare: Bare, trunk: Trunk, cells: Sequence[Cell], states: torch.Tensor) -> torch.Tensor:
    """The last state of every cell's last token, (n_cells, d_model)."""
    hidden, own = _starting(trunk, cells, states), trunk.own
    angles = bare.angles(torch.arange(trunk.start, trunk.start + own))
    entries = torch.tensor([cell.target_layer for cell in cells])
    most = bare.limits.tokens // own
    for layer in range(bare.depth):
        running = int((entries < layer).sum())
        only_last = layer + 1 == bare.depth and own > 1
        for first in range(0, running, most):
            rows = hidden[first : min(first + most, running)]
            given = rows.flatten(0, 1), tuple(one.repeat(len(rows), 1, 1) for one in angles)

            def attend(given: Projected, count: int = len(rows), layer: int = layer) -> torch.Tensor:
                keys, values = given.keys.unflatten(0, (count, own)), given.values.unflatten(0, (count, own))
                own_tokens = Own(keys.transpose(1, 2), values.transpose(1, 2))
                queries = given.queries.unflatten(0, (count, -1))
                return branching(queries, own_tokens, trunk.shared[layer], bare.scale)

            if only_last:
                rows[:, -1] = bare.block(layer, *given, attend, asked=slice(own - 1, None, own))
            else:
                rows.copy_(bare.block(layer, *given, attend).view_as(rows))
    return hidden[:, -1]


def generated(bare: Bare, workload: Workload, states: torch.Tensor, tokenizer: Any) -> Answers:
    """The text that every cell goes on with."""
    trunk = Trunk(bare, workload)
    if trunk.own > 1:
        raise ValueError("The floor generates only where the target's last token is patched.")
    answers: Answers = {}
    for cells in _cut(_by_entry(workload.cells), bare.limits.rows):
        ids = Decoding(bare, trunk, workload, cells).run(states).tolist()
        answers.update(
            {cell: Said(text_of(one, workload, tokenizer)) for cell, one in zip(cells, ids, strict=True)}
        )
    return answers


class Decoding:
    """Rows that decode together.

    Attributes:
        own: For each block the keys and values of each row's own tokens, with room for all it will have.
    """

    def __init__(self, bare: Bare, trunk: Trunk, workload: Workload, cells: Sequence[Cell]) -> None:
        self.bare, self.trunk, self.workload, self.cells = bare, trunk, workload, cells
        room = (len(cells), bare.n_kv_heads, workload.max_new_tokens, bare.d_head)
        self.own = [Own(*(bare.embed.weight.new_empty(room) for _ in range(2))) for _ in range(bare.depth)]
        self.filled = 0

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """The ids each row goes on with, (n_rows, n_tokens); after its end, anything."""
        bare, most = self.bare, self.workload.max_new_tokens
        eos = torch.tensor(self.workload.eos, device=bare.device)
        alive = torch.arange(len(self.cells), device=bare.device)
        said = alive.new_zeros(len(self.cells), most)
        ended = torch.zeros_like(alive, dtype=torch.bool)
        hidden = self._prompt(states)
        for step in range(most):
            token = torch.cat([bare.top_token(rows) for rows in hidden.split(bare.limits.tokens)])
            said[alive, step] = token
            ended |= torch.isin(token, eos)
            gone = int(ended.sum())
            if step + 1 == most or gone == len(ended):
                break
            if gone * _ENDED >= len(ended):
                stay = (~ended).nonzero()[:, 0]
                alive, token, ended = alive[stay], token[stay], ended[stay]
                self.own = [Own(keys[stay], values[stay]) for keys, values in self.own]
            hidden = self._through(bare.embed(token), [0] * bare.depth)
        return said

    def _prompt(self, states: torch.Tensor) -> torch.Tensor:
        """Run the patched token; below l* its keys and values are the clean prompt's."""
        entries = torch.tensor([cell.target_layer for cell in self.cells])
        firsts = [int((entries < layer).sum()) for layer in range(self.bare.depth)]
        for layer, running in enumerate(firsts):
            for room, clean in zip(self.own[layer], self.trunk.own_clean[layer], strict=True):
                room[running:, :, :1] = clean
        return self._through(_starting(self.trunk, self.cells, states)[:, 0], firsts, entering=True)

    def _through(self, hidden: torch.Tensor, counts: list[int], *, entering: bool = False) -> torch.Tensor:
        """Run one token of every row through the blocks; where they enter, the first so many of each."""
        bare, filled = self.bare, self.filled
        angles = bare.angles(torch.tensor([self.trunk.start + filled]))
        for layer in range(bare.depth):
            running = counts[layer] if entering else len(hidden)
            for first in range(0, running, bare.limits.tokens):
                rows = slice(first, min(first + bare.limits.tokens, running))
                room = Own(*(one[rows, :, : filled + 1] for one in self.own[layer]))

                def attend(given: Projected, room: Own = room, layer: int = layer) -> torch.Tensor:
                    room.keys[:, :, -1], room.values[:, :, -1] = given.keys, given.values
                    return branching(given.queries[:, None], room, self.trunk.shared[layer], bare.scale)

                hidden[rows] = bare.block(layer, hidden[rows], angles, attend)
        self.filled += 1
        return hidden
