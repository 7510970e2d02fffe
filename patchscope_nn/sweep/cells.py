"""All cells of a sweep. Blocks of them are made on demand as arrays, so that large sweeps need no memory."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from patchscope_nn._util.ragged import Ints, Ragged, ranges
from patchscope_nn.spec import STATELESS, Control
from patchscope_nn.sweep.cell import Cell, CellBlock, Weighted
from patchscope_nn.sweep.checks import check_positions, check_readout_position, same_layer
from patchscope_nn.sweep.digests import digests, mix
from patchscope_nn.sweep.entry import Entry, PositionSet, Source, VectorAt, prompt_of
from patchscope_nn.sweep.resolve import Resolver

#: How many cells a block holds when all cells are gone through.
BLOCK = 2**16
#: Fields that say which cells there are, and not what a cell is. Other fields are part of every cell's seed.
_SELECTION = {
    "source": {"prompt", "position", "layer", "vector", "minus", "model"},
    "target": {"prompt", "prompts", "combine", "position", "layer", "model", "scale"},
}


class Origin(NamedTuple):
    """Where a state is read: a source, and positions whose states are patched together."""

    source: Source
    positions: PositionSet


#: A state that is written: origins, by number, and their weights in a sum. One origin of weight 1 is no sum.
Read = tuple[tuple[int, float], ...]


class Numbered(dict[Any, int]):
    """Numbers distinct keys in the order in which they are first looked up."""

    def __missing__(self, key: Any) -> int:
        self[key] = len(self)
        return self[key]


class Cells(Sequence[Cell]):
    """The cells of a sweep, in the order of the data rows. Blocks of cells are made on demand.

    An entry has its unpatched cells, then for every (i, i*, l, l*, scale, sample) the real cell and its
    controls. An entry whose T holds the source's text instead of a state has a single cell.

    Args:
        resolver: The resolver that made the entries.
        entries: The resolved data rows.
        others: For each entry, the entry whose state `shuffled` writes; None without that control.
        controls: The controls.
        depth: The number of blocks of M*.
        seed: The seed of all random numbers.

    Attributes:
        controls: None for the real cells, then the names of the controls.
        writes_state: True if patched cells write a state.
        compares: True if cells are compared with the source's own next-token distribution.
        row_of, target_of: The data row and T of each entry.
        starts: (n_entries + 1) the number of each entry's first cell.
        positions: The distinct sets of positions of T.
        first_position, last_position: The smallest and the largest position of each set.
        origins: The distinct origins of states.
        origin_source, origin_positions: The source (a prompt, or an index into the sweep's vectors) and the
            positions of each origin.
        reads: The distinct states that are written, without their layer.
        read_origins, read_weights: The origins of each state, and their weights in one array.

    Raises:
        InputError: Positions, layers or the readout do not go together in some row.
    """

    def __init__(
        self,
        resolver: Resolver,
        entries: Sequence[Entry],
        others: Sequence[int] | None,
        *,
        controls: Sequence[Control],
        depth: int,
        seed: int,
    ) -> None:
        self._resolver, self._entries, self._depth = resolver, entries, depth
        target = resolver.scope.target
        stateful = [control for control in controls if control not in STATELESS]
        self.controls: tuple[Control | None, ...] = (None, *stateful, *STATELESS)
        self._n_kinds = 1 + len(stateful)
        self._has_unpatched = "unpatched" in controls
        self.writes_state, self.compares = target.needs_state, resolver.compares
        self._scales = np.array(target.scale if self.writes_state else (1.0,))
        self._samples = target.corrupt.samples if target.corrupt else 1
        self._layers = np.array(self._all_layers(depth), np.int64).reshape(-1, 2)
        for entry in entries:
            self._check(entry)
        self._index(entries, others)
        self._digest(entries, seed)

    def _all_layers(self, depth: int) -> list[tuple[int, int]]:
        """Return every (l, l*). A write that needs no state has l = l*."""
        resolver = self._resolver
        shifts = resolver.shift - resolver.target_shift
        written = resolver.target_layers
        if written is None:
            return [(layer, same_layer(layer, shifts, depth)) for layer in resolver.layers]
        if not self.writes_state:
            return [(layer, layer) for layer in written]
        return [(layer, target) for layer in resolver.layers for target in written]

    def _check(self, entry: Entry) -> None:
        n_tokens = len(self._resolver.targets.encoded[entry.target_prompt].ids)
        single = not self.writes_state or self._resolver.scope.source.mean == "positions"
        for positions, written in entry.position_pairs:
            if not single and not entry.text_only:
                check_positions(positions, written)
            # If T holds the source's text, nothing is written, so no readout position is too early.
            patched = (0,) if entry.text_only else written
            check_readout_position(self._resolver.scope.readout, patched, n_tokens)

    def _index(self, entries: Sequence[Entry], others: Sequence[int] | None) -> None:
        """Number what cells refer to, and tabulate for each entry what its cells are combined from."""
        positions, origins, reads = Numbered(), Numbered(), Numbered()
        of_entry, pairs, unpatched = [], [], []
        for entry in entries:
            n_reads = len(entry.source_positions)
            of_entry.append([reads[self._read(entry, at, origins)] for at in range(n_reads)])
            pairs_of_entry = [
                (at, positions[written], self._origin(entry, at, origins))
                for at, read in enumerate(entry.source_positions)
                for written in entry.target_positions or (read,)
            ]
            unpatched.append(self._unpatched(entry, pairs_of_entry, positions))
            pairs.append([] if entry.text_only else pairs_of_entry)
        self.positions, self.origins, self.reads = Ragged(positions), (*origins,), (*reads,)
        self.first_position = np.array([min(at, default=0) for at in positions])
        self.last_position = np.array([max(at, default=0) for at in positions])
        vectors = {vector: number for number, vector in enumerate(self._resolver.vectors)}
        self.origin_source = np.array(
            [vectors[at] if isinstance(at, VectorAt) else at for at, _ in self.origins], np.int64
        )
        self.origin_positions = Ragged(at for _, at in self.origins)
        self.read_origins = Ragged([origin for origin, _ in read] for read in self.reads)
        self.read_weights = np.array([weight for read in self.reads for _, weight in read])
        self.row_of = np.array([entry.row for entry in entries])
        self.target_of = np.array([entry.target_prompt for entry in entries])
        self._reads_of = Ragged(of_entry)
        self._others = np.arange(len(entries)) if others is None else np.array(others)
        self._pairs, self._pair_start, self._n_pairs = _flat(pairs)
        self._bare, self._bare_start, self._n_bare = _flat(unpatched)
        per_layer = len(self._layers) // len(self._resolver.layers)
        single = np.array([-1 if entry.layer is None else entry.layer for entry in entries])
        self._first_layer = np.where(single < 0, 0, single * per_layer)
        self._n_layers = np.where(single < 0, len(self._layers), per_layer)
        sizes = self._n_pairs * self._n_layers * len(self._scales) * self._samples * self._n_kinds
        self.starts: Ints = np.concatenate([[0], np.cumsum(self._n_bare + sizes)])
        self._text_only = np.array([entry.text_only for entry in entries])

    def _read(self, entry: Entry, at: int, origins: Numbered) -> Read:
        """Return the state of an entry's i number `at`."""
        own = (entry.source, entry.source_positions, entry.weight)
        return tuple((origins[Origin(of, where[at])], weight) for of, where, weight in (own, *entry.terms))

    def _origin(self, entry: Entry, at: int, origins: Numbered) -> int:
        """Return the origin of the distribution that a cell is compared with; 0 if nothing is compared."""
        if not self.compares:
            return 0
        return origins[Origin(prompt_of(entry.source), entry.source_positions[at][-1:])]

    def _unpatched(
        self, entry: Entry, pairs: Sequence[tuple[int, int, int]], positions: Numbered
    ) -> list[tuple[int, int, int]]:
        """Return (i*, compared origin, sample) of each unpatched cell of an entry."""
        if entry.text_only:
            last = entry.target_positions[0] if entry.target_positions else ()
            return [(positions[last], pairs[0][2], 0)]
        if not self._has_unpatched:
            return []
        runs = dict.fromkeys((written, compared) for _, written, compared in pairs)
        return [(*run, sample) for run in runs for sample in range(self._samples)]

    def _digest(self, entries: Sequence[Entry], seed: int) -> None:
        """Make the digests that the seeds of cells are mixed from."""
        resolver = self._resolver
        scope = resolver.scope.model_dump(mode="json", exclude=_SELECTION)
        if scope["target"]["corrupt"]:
            del scope["target"]["corrupt"]["samples"]
        common = hashlib.sha256(repr((scope, seed)).encode())
        targets, sources = resolver.targets.digests, resolver.sources.digests
        self._entry_digests = digests(
            (
                (
                    *(targets[entry.target_prompt], entry.reference_ids, entry.continuations),
                    *(entry.corrupted, entry.unseen),
                )
                for entry in entries
            ),
            common,
        )
        self._control_digests = digests(self.controls)
        self._position_digests = digests(map(self.positions.row, range(len(self.positions))))
        origins = [
            (str(source) if isinstance(source, VectorAt) else sources[source], positions)
            for source, positions in self.origins
        ]
        self._origin_digests = digests(origins)
        self._read_digests = digests([(origins[at], weight) for at, weight in read] for read in self.reads)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[Cell]:
        for block in self.blocks():
            yield from block

    @overload
    def __getitem__(self, place: int) -> Cell: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Cell, ...]: ...
    def __getitem__(self, place: int | slice) -> Cell | tuple[Cell, ...]:
        numbers = range(len(self))[place]
        if isinstance(numbers, range):
            return tuple(self.block(np.array(numbers)))
        return self.block(np.array([numbers]))[0]

    def blocks(self) -> Iterator[CellBlock]:
        """Yield all cells, in blocks."""
        for start in range(0, len(self), BLOCK):
            yield self.block(np.arange(start, min(start + BLOCK, len(self))))

    def block(self, number: Ints) -> CellBlock:
        """Make some cells: the inverse of the order in which `starts` counts them.

        Args:
            number: Their indices.
        """
        entry = np.searchsorted(self.starts, number, side="right") - 1
        index = number - self.starts[entry]
        patched = index >= self._n_bare[entry]
        bare = self._bare[np.where(patched, 0, self._bare_start[entry] + index)].T
        rest, kind = np.divmod(np.where(patched, index - self._n_bare[entry], 0), self._n_kinds)
        rest, sample = np.divmod(rest, self._samples)
        rest, scale = np.divmod(rest, len(self._scales))
        pair, layer = np.divmod(rest, self._n_layers[entry])
        at, written, compared = self._pairs[np.where(patched, self._pair_start[entry] + pair, 0)].T
        layers = self._layers[self._first_layer[entry] + layer] * patched[:, None]
        control = np.where(patched, kind, self._n_kinds + self._text_only[entry])
        shuffled = [name == "shuffled" for name in self.controls]
        source = np.where(np.array(shuffled)[control], self._others[entry], entry)
        last = self._reads_of.counts[source] - 1
        columns = {
            "entry": entry,
            "control": control,
            "patched": patched,
            "read": self._reads_of.values[self._reads_of.starts[source] + np.minimum(at, last)],
            "layer": layers[:, 0],
            "positions": np.where(patched, written, bare[0]),
            "target_layer": layers[:, 1],
            "scale": np.where(patched, self._scales[scale], 1.0),
            "sample": np.where(patched, sample, bare[2]),
            "reference": np.where(patched, compared, bare[1]),
        }
        return CellBlock(cells=self, number=number, **columns, seed=self._seeds(**columns))

    def _seeds(self, **columns: Any) -> Ints:
        """Return a digest of 56 bits of what each cell is."""
        read = self._read_digests[columns["read"]]
        layered = self._resolver.scope.source.vector is None  # a vector is the same for every l
        mixed = np.zeros(len(read), np.uint64)
        for part in (
            self._entry_digests[columns["entry"]],
            self._control_digests[columns["control"]],
            np.where(columns["patched"] & self.writes_state, read, np.uint64(0)),
            columns["layer"] * layered,
            columns["target_layer"],
            self._position_digests[columns["positions"]],
            self._origin_digests[columns["reference"]] if self.compares else columns["sample"],
            columns["scale"].view(np.uint64),
            columns["sample"],
        ):
            mixed = mix(mixed + part.astype(np.uint64))
        return (mixed >> np.uint64(8)).astype(np.int64)

    def read_terms(self, read: int) -> tuple[Source, PositionSet, tuple[Weighted, ...]]:
        """Return the source and the positions of a state, and all its terms if it is a sum."""
        terms = [(*self.origins[at], weight) for at, weight in self.reads[read]]
        source, positions, weight = terms[0]
        return source, positions, tuple(terms) if len(terms) > 1 or weight != 1 else ()

    def reference(self, origin: int) -> tuple[int, int]:
        """Return the (prompt, position) whose next-token distribution a cell is compared with."""
        source, positions = self.origins[origin]
        return prompt_of(source), positions[-1]

    def unseen(self, entry: int, control: int, positions: int, seed: int) -> PositionSet:
        """Return the tokens that a patched cell's i* cannot attend to; `random` draws others."""
        unseen = self._entries[entry].unseen
        if not unseen or self.controls[control] != "random":
            return unseen
        # As many tokens as are cut off from i*, drawn from the others that i* could attend to.
        free = [at for at in range(max(self.positions.row(positions))) if at not in unseen]
        return tuple(sorted(random.Random(seed).sample(free, min(len(free), len(unseen)))))  # noqa: S311 (seeded)

    def origins_of(self, entries: Ints) -> tuple[Ints, Ints]:
        """Return the origins that the patched cells of entries read, and for each its index in `entries`."""
        n_entries = len(entries)
        reads, index = self._reads_of.take(np.concatenate([entries, self._others[entries]]))
        origins, of_read = self.read_origins.take(reads)
        return origins, index[of_read] % n_entries

    def references_of(self, entries: Ints) -> Ints:
        """Return the origins of the distributions that cells of entries are compared with, if they are."""
        pairs = ranges(self._pair_start[entries], self._n_pairs[entries])
        return np.unique(self._pairs[pairs, 2])

    @property
    def layers(self) -> tuple[int, ...]:
        """Every l that is read, including those of a window that writes each block's own state."""
        depth = self._resolver.sources.model.info.n_layers
        read = (layer + step for layer in self._resolver.layers for step in self._steps)
        return tuple(dict.fromkeys(layer for layer in read if layer < depth))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (l, l*) that a state is mapped for."""
        layers = self._layers.tolist()
        pairs = ((layer + step, written + step) for layer, written in layers for step in self._steps)
        return tuple(dict.fromkeys(pair for pair in pairs if pair[1] < self._depth))

    @property
    def _steps(self) -> range:
        """The steps from the first block of a write to those whose own states it maps."""
        target = self._resolver.scope.target
        return range(target.window if target.states == "own" else 1)


def _flat(rows: Sequence[Sequence[tuple[int, int, int]]]) -> tuple[Ints, Ints, Ints]:
    """Return rows of triples one after the other and one more, (n + 1, 3); each row's start and length."""
    counts = np.array([len(row) for row in rows])
    triples = [triple for row in rows for triple in row]
    return np.array([*triples, (0, 0, 0)]), np.cumsum(counts) - counts, counts
