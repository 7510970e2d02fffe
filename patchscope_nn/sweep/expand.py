"""Expands a Patchscope over its data rows, layers and positions. Pure; no tensors, no weights.

1. Resolve every row into entries (`resolve.py`).
2. If states are averaged over rows, merge the entries of those rows into one.
3. For the control `shuffled`, choose for each entry another entry whose state is written instead.
4. Pair sources with targets, and add the controls (`cells.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from patchscope_nn._util.ragged import Ints, Ragged
from patchscope_nn.errors import DataError, InputError, Problem, SpecError, did_you_mean
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.spec import Control, Patchscope, read_position
from patchscope_nn.spec.encoding import Encoded, dropped_notice
from patchscope_nn.sweep.cell import CellBlock, Flags
from patchscope_nn.sweep.cells import Cells
from patchscope_nn.sweep.entry import Entry, Row, Source, Term, VectorAt, prompt_of
from patchscope_nn.sweep.resolve import Resolver
from patchscope_nn.sweep.states import StateNumbers


class Writes(NamedTuple):
    """What cells write, with one number for each write.

    Attributes:
        cell: The index of its cell.
        layer: l.
        target_layer: The block that is written.
        mapped: The l* that the mapping takes the state to: one state for a whole window has one.
        first: True for the first write of its cell.
    """

    cell: Ints
    layer: Ints
    target_layer: Ints
    mapped: Ints
    first: Flags


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All cells of a Patchscope, and the prompts that they refer to by number.

    Attributes:
        scope: The Patchscope.
        source: The description of M.
        target: The description of M*.
        source_prompts: Every distinct S.
        target_prompts: Every distinct T.
        cells: The cells, in the order of the data rows. Each is made on demand.
        rows: The data rows.
        entries: The resolved data rows.
        vectors: Every distinct vector from a file.
        shifts: The offsets of the two sites: added to the l and l* of a cell, they give the layers that the
            user named. 1 for the input of a block.
        seed: The seed of all random numbers.
    """

    scope: Patchscope
    source: ModelInfo
    target: ModelInfo
    source_prompts: tuple[Encoded, ...] = field(repr=False)
    target_prompts: tuple[Encoded, ...] = field(repr=False)
    cells: Cells = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)
    entries: tuple[Entry, ...] = field(repr=False)
    vectors: tuple[VectorAt, ...] = ()
    shifts: tuple[int, int] = (0, 0)
    seed: int = 0

    @property
    def notices(self) -> tuple[str, ...]:
        """Notes for the user about the prompts."""
        dropped = dict.fromkeys(prompt.dropped for prompt in (*self.source_prompts, *self.target_prompts))
        return tuple(dropped_notice(names) for names in dropped if names)

    def source_text(self, source: Source) -> str:
        """Return a source as text: its prompt, or the path of its vector."""
        return str(source) if isinstance(source, VectorAt) else self.source_prompts[source].text

    @cached_property
    def source_tokens(self) -> Ragged:
        """The token ids of every S."""
        return Ragged(prompt.ids for prompt in self.source_prompts)

    @cached_property
    def target_tokens(self) -> Ragged:
        """The token ids of every T."""
        return Ragged(prompt.ids for prompt in self.target_prompts)

    @cached_property
    def read_at(self) -> Ints:
        """The position at which each T is read."""
        counts = self.target_tokens.counts.tolist()
        return np.array([read_position(self.scope.readout, count) for count in counts])

    @cached_property
    def reference_ids(self) -> Ints:
        """(n_entries, n) the ids of the named reference tokens."""
        ids = [entry.reference_ids for entry in self.entries]
        return np.array(ids, np.int64).reshape(len(self.entries), -1)

    @cached_property
    def continuation_tokens(self) -> Ints:
        """(n_entries, n_choices) the number of tokens of each text that the readout appends."""
        counts = [[len(ids) for ids in entry.continuations] for entry in self.entries]
        return np.array(counts, np.int64).reshape(len(self.entries), -1)

    @cached_property
    def appended(self) -> Ints:
        """The most tokens that the readout appends to a prompt, for each entry."""
        return self.continuation_tokens.max(axis=1, initial=self.scope.readout.decoded)

    @property
    def states(self) -> StateNumbers:
        """Numbers the states that are read."""
        return StateNumbers(self.source.n_layers)

    def reads_of(self, block: CellBlock, writes: Writes | None = None) -> Ints:
        """Return the distinct states that some cells need from source passes, sorted.

        Args:
            block: The cells.
            writes: What they write, if that is known.
        """
        needed = [np.empty(0, np.int64)]
        if self.scope.target.needs_state and self.scope.source.vector is None:
            writes = writes or self.writes(block)
            origins, index = self.cells.read_origins.take(block.read[writes.cell])
            needed.append(self.states.hidden(origins, writes.layer[index]))
        if self.cells.compares:
            needed.append(self.states.final(block.reference))
        return np.unique(np.concatenate(needed))

    def writes(self, block: CellBlock) -> Writes:
        """Return what some cells write: once, or for a window once in each block that both models have."""
        target = self.scope.target
        steps = np.arange(target.window)[:, None]
        layer = block.layer + steps * (target.states == "own")
        written = block.target_layer + steps
        index = np.broadcast_to(np.arange(len(block)), written.shape)
        kept = block.patched & (written < self.target.n_layers)
        if target.needs_state:
            kept &= layer < self.source.n_layers
        mapped = written if target.states == "own" else np.broadcast_to(block.target_layer, written.shape)
        first = np.broadcast_to(steps == 0, written.shape)
        return Writes(index[kept], layer[kept], written[kept], mapped[kept], first[kept])


def expand(
    scope: Patchscope,
    *,
    rows: Sequence[Row],
    controls: Sequence[Control] = (),
    source: Model,
    target: Model,
    seed: int = 0,
) -> Sweep:
    """Resolve a Patchscope into its cells.

    Args:
        scope: The Patchscope.
        rows: The data rows; `[{}]` for prompts without placeholders.
        controls: `unpatched` adds one cell for each row and T; `random` and `shuffled` add one for each cell.
        source: M. Only its description and its tokenizer are used.
        target: M*, likewise.
        seed: The seed of random states, of the choice of other rows, and of sampling.

    Returns:
        The sweep.

    Raises:
        InputError: A prompt, position, layer, site or reference does not resolve; the message names the
            field and, if there are several rows, the data row.
    """
    if not rows:
        raise DataError("the data has no rows.", hint="Give at least one, or raise --limit.")
    _check_controls(scope, controls)
    resolver = Resolver(scope, source, target, text_only="text-only" in controls)
    entries = [
        entry for number, row in enumerate(rows) for entry in _numbered(resolver, row, number, len(rows))
    ]
    if scope.source.mean is not None and scope.source.mean != "positions":
        rows, entries = _averaged(scope, rows, entries)
    others = _others(scope, entries, seed=seed) if "shuffled" in controls else None
    cells = Cells(resolver, entries, others, controls=controls, depth=target.info.n_layers, seed=seed)
    return Sweep(
        scope=scope,
        source=source.info,
        target=target.info,
        source_prompts=tuple(resolver.sources.encoded),
        target_prompts=tuple(resolver.targets.encoded),
        cells=cells,
        rows=tuple(rows),
        entries=tuple(entries),
        vectors=tuple(resolver.vectors),
        shifts=(resolver.shift, resolver.target_shift),
        seed=seed,
    )


def _check_controls(scope: Patchscope, controls: Sequence[Control]) -> None:
    mode = scope.target.mode
    stateful = [name for name in controls if name == "shuffled" or (name == "random" and mode != "cut")]
    if stateful and not scope.target.needs_state:
        raise SpecError(
            [
                Problem(
                    field="controls",
                    message=f"{stateful[0]} replaces a state, and target.write: {mode} writes none; "
                    f"leave it out{', or use random' if mode == 'cut' else ''}",
                )
            ]
        )


def _numbered(resolver: Resolver, row: Row, number: int, count: int) -> list[Entry]:
    try:
        return resolver.resolve(row, number)
    except InputError as error:
        if count == 1:
            raise
        raise type(error)(f"data row {number}: {error.message}", hint=error.hint) from error


def _averaged(
    scope: Patchscope, rows: Sequence[Row], entries: Sequence[Entry]
) -> tuple[list[Row], list[Entry]]:
    """Merge all rows, or all rows with the same value of a column, into one row with their mean state."""
    column = scope.source.mean[1] if isinstance(scope.source.mean, tuple) else None
    if column is not None and any(column not in row for row in rows):
        names = [name for name in rows[0] if all(name in row for row in rows)]
        raise DataError(
            f"source.mean: the data has no column {column!r} in every row.", hint=did_you_mean(column, names)
        )
    groups: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(None if column is None else str(row[column]), []).append(number)
    of_row: dict[int, list[Entry]] = {}
    for entry in entries:
        of_row.setdefault(entry.row, []).append(entry)
    averaged: list[Entry] = []
    common: list[Row] = []
    for numbers in groups.values():
        first = rows[numbers[0]]
        common.append({k: v for k, v in first.items() if all(rows[row].get(k) == v for row in numbers)})
        groups_of_entries = zip(*(of_row[row] for row in numbers), strict=True)
        averaged += [_mean(merged, row=len(common) - 1) for merged in groups_of_entries]
    return common, averaged


def _mean(entries: Sequence[Entry], *, row: int) -> Entry:
    """Merge entries that differ only in their source into one, whose state is the mean of theirs."""
    if len({_without_source(entry) for entry in entries}) > 1:
        raise DataError(
            "source.mean: the averaged rows should have the same target prompt and readout, since their mean "
            "is written and read once, and theirs differ.",
            hint="Leave columns out of target and readout, or use those that all averaged rows share.",
        )
    sizes = {tuple(map(len, entry.source_positions)) for entry in entries}
    if len(sizes) > 1:
        raise DataError(
            "source.mean: rows are averaged position by position, and they have different numbers of "
            "positions.",
            hint="Name one position.",
        )
    weight = 1 / len(entries)
    terms = [Term(prompt_of(entry.source), entry.source_positions, weight) for entry in entries[1:]]
    terms += [
        Term(term.prompt, term.positions, term.weight * weight) for entry in entries for term in entry.terms
    ]
    return replace(entries[0], row=row, weight=weight, terms=tuple(terms))


def _without_source(entry: Entry) -> Entry:
    return replace(entry, row=0, source=0, source_positions=(), weight=1.0, terms=())


def _others(scope: Patchscope, entries: Sequence[Entry], *, seed: int) -> tuple[int, ...]:
    """For each entry, choose one of another row with another source, whose state `shuffled` writes."""
    first: dict[int, int] = {}
    for number, entry in enumerate(entries):
        first.setdefault(entry.row, number)
    order = list(first)
    random.Random(seed).shuffle(order)  # noqa: S311 (a seeded choice, no secret)
    place_of = {row: index for index, row in enumerate(order)}
    averaged = scope.source.mean == "positions"
    others = []
    for number, entry in enumerate(entries):
        if entry.text_only:
            others.append(number)
            continue
        candidates = (
            first[order[(place_of[entry.row] + step) % len(order)]] for step in range(1, len(order))
        )
        fitting = (other for other in candidates if _can_replace(entries[other], entry, averaged=averaged))
        other = next(fitting, None)
        if other is None:
            raise DataError(
                f"controls: shuffled gives data row {entry.row} the state of another row with another source "
                "prompt and as many positions, and there is none.",
                hint="Give more rows (raise --limit), or leave shuffled out.",
            )
        others.append(other)
    return tuple(others)


def _can_replace(other: Entry, entry: Entry, *, averaged: bool) -> bool:
    """Return whether `other` reads another source than `entry`, and as many states (one if `averaged`)."""
    other_sizes, sizes = (
        [1 if averaged else len(positions) for positions in side.source_positions] for side in (other, entry)
    )
    fits = all(size == other_sizes[min(place, len(other_sizes) - 1)] for place, size in enumerate(sizes))
    return (other.source, other.terms) != (entry.source, entry.terms) and fits
