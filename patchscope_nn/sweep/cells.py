"""The cells of a sweep, each made when it is asked for, so that a hundred thousand of them take no room."""

from __future__ import annotations

import hashlib
import itertools
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, overload

from patchscope_nn.errors import LayerError, PositionError
from patchscope_nn.spec import STATELESS, Control, Readout
from patchscope_nn.sweep.entry import Entry, Source, Together, VectorAt, prompt_of
from patchscope_nn.sweep.resolve import Resolver

#: One of several states that are added up: its source, its positions, and what it is multiplied with.
Weighted = tuple[Source, Together, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One fully resolved combination.

    `None` stands for what a run does not have: an unpatched one a source and l*, one that writes no state a
    source.

    Attributes:
        number: Its place in the sweep.
        row: The data row it answers for.
        entry: The entry of that row (see `resolve.Entry`).
        control: None for the real cell, else the control's name.
        source: S, the number of a prompt in `Sweep.source_prompts`; or a vector from a file.
        source_positions: i, from the left; several are patched together.
        source_layer: l; -1 is the input of block 0.
        terms: Where several states are added up, all of them; else empty.
        target_prompt: T, a number in `Sweep.target_prompts`.
        target_positions: i*, as many as i.
        target_layer: l*.
        scale: What the mapped state is multiplied with.
        sample: Which draw of the noise on T's embeddings.
        unseen: The tokens that i* does not see.
        reference: The (prompt, position) whose unpatched next-token distribution it is compared with.
        seed: A digest of what this cell is, whatever its row: what its random numbers start from. Cells
            with the same seed are the same run.
    """

    number: int
    row: int
    entry: int
    control: Control | None
    source: Source | None
    source_positions: Together | None
    source_layer: int | None
    terms: tuple[Weighted, ...]
    target_prompt: int
    target_positions: Together
    target_layer: int | None
    scale: float
    sample: int
    unseen: Together
    reference: tuple[int, int] | None
    seed: int


class _Unpatched(NamedTuple):
    """An unpatched run: the source position it is compared at, and what of T it leaves as it is."""

    positions: Together
    written: Together


class _Patch(NamedTuple):
    """What is written where: what is read, l, i*, l*, what it is multiplied with; None for nothing."""

    source: tuple[Source, Together, tuple[Weighted, ...]] | None
    layer: int | None
    target_positions: Together
    target_layer: int | None
    scale: float = 1.0
    sample: int = 0


class Cells(Sequence[Cell]):
    """The cells of a sweep, in the order of the data's rows, each made when it is asked for.

    An entry's cells are its unpatched ones, then for every (i, i*, l, l*) the real one and its controls.
    Where T holds the source's text instead of a state, there is one.

    Args:
        resolver: What resolved the rows.
        entries: The data rows, resolved.
        others: For each entry the one whose state it is shown by `shuffled`; None where that is not asked.
        controls: The controls.
        depth: The number of blocks of M*.
        seed: What random numbers start from.

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
        self._resolver, self._entries, self._others = resolver, entries, others
        stateful = (one for one in controls if one not in STATELESS)
        self._kinds: tuple[Control | None, ...] = (None, *stateful)
        self._unpatched_too = "unpatched" in controls
        self._said = repr((resolver.scope.model_dump(mode="json"), seed)).encode()
        target = resolver.scope.target
        self._writes_state = target.needs_state
        self._scales = target.scale if self._writes_state else (1.0,)
        self._samples = target.corrupt.samples if target.corrupt else 1
        self._depth = depth
        self._layers = self._all_layers(depth)
        for one in entries:
            self._check(one)
        self._starts = [0, *itertools.accumulate(map(self._size, entries))]
        self._entry_digest = lru_cache(maxsize=4)(self._make_entry_digest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Cell]:
        for entry in range(len(self._entries)):
            yield from self.of_entry(entry)

    @overload
    def __getitem__(self, place: int) -> Cell: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Cell, ...]: ...
    def __getitem__(self, place: int | slice) -> Cell | tuple[Cell, ...]:
        if isinstance(place, slice):
            return tuple(self[one] for one in range(*place.indices(len(self))))
        number = range(len(self))[place]
        entry = bisect_right(self._starts, number) - 1
        return self._cell(entry, number - self._starts[entry])

    @property
    def layers(self) -> tuple[int, ...]:
        """Every l that is read, those of a window that writes each block's own state included."""
        target, depth = self._resolver.scope.target, self._resolver.sources.model.info.n_layers
        more = target.window if target.states == "own" else 1
        read = (layer + step for layer in self._resolver.layers for step in range(more))
        return tuple(dict.fromkeys(layer for layer in read if layer < depth))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (l, l*) that a state is mapped for."""
        target = self._resolver.scope.target
        more = target.window if target.states == "own" else 1
        found = ((layer + step, written + step) for layer, written in self._layers for step in range(more))
        return tuple(dict.fromkeys(pair for pair in found if pair[1] < self._depth))

    @property
    def compares(self) -> bool:
        """Whether cells are compared with the source's own next-token distribution."""
        return self._resolver.compares

    def of_entry(self, entry: int) -> Iterator[Cell]:
        """The cells of one entry."""
        for index in range(self._starts[entry + 1] - self._starts[entry]):
            yield self._cell(entry, index)

    def sources(self, entry: int) -> Iterator[tuple[int, tuple[Together, ...]]]:
        """Yield every (S, positions i) that the cells of an entry read."""
        for one in (entry, *(() if self._others is None else (self._others[entry],))):
            found = self._entries[one]
            if not isinstance(found.source, VectorAt):
                yield found.source, found.source_positions
            yield from ((term.prompt, term.positions) for term in found.terms)

    def _all_layers(self, depth: int) -> list[tuple[int, int]]:
        """Every (l, l*); what writes no state is where it writes."""
        resolver = self._resolver
        shifts = resolver.shift - resolver.target_shift
        written = resolver.target_layers
        if written is None:
            return [(layer, _same(layer, shifts, depth)) for layer in resolver.layers]
        if not self._writes_state:
            return [(layer, layer) for layer in written]
        return [(layer, target) for layer in resolver.layers for target in written]

    def _layers_of(self, one: Entry) -> list[tuple[int, int]]:
        if one.layer is None:
            return self._layers
        layer = self._resolver.layers[one.layer]
        return [pair for pair in self._layers if pair[0] == layer]

    def _size(self, one: Entry) -> int:
        if one.text_only:
            return 1
        patched = len(self._places(one)) * len(self._layers_of(one)) * len(self._scales) * len(self._kinds)
        return (len(self._unpatched(one)) + patched) * self._samples

    def _unpatched(self, one: Entry) -> list[_Unpatched]:
        if not self._unpatched_too:
            return []
        # Where nothing is compared, the source's position makes no difference to an unpatched run.
        compared = self._resolver.compares
        places = self._places(one)
        found = ((positions if compared else places[0][0], written) for positions, written in places)
        return [_Unpatched(*pair) for pair in dict.fromkeys(found)]

    @staticmethod
    def _places(one: Entry) -> list[tuple[Together, Together]]:
        """Every (i, i*) of an entry."""
        return [
            (positions, written)
            for positions in one.source_positions
            for written in one.target_positions or (positions,)
        ]

    def _check(self, one: Entry) -> None:
        count = len(self._resolver.targets.encoded[one.target_prompt].ids)
        single = not self._writes_state or self._resolver.scope.source.mean == "positions"
        for positions, written in self._places(one):
            if not single and not one.text_only:
                _check_positions(positions, written)
            # Where T holds the source's text nothing is written that could come too late.
            _check_readout(self._resolver.scope.readout, (0,) if one.text_only else written, count)

    def _cell(self, entry: int, index: int) -> Cell:
        one = self._entries[entry]
        number = self._starts[entry] + index
        if one.text_only:
            patch = _Patch(None, None, _only(one.target_positions), None)
            return self._make(number, entry, "text-only", one.source_positions[0], patch)
        unpatched = self._unpatched(one) if self._unpatched_too else []
        if index < len(unpatched) * self._samples:
            at, sample = divmod(index, self._samples)
            positions, written = unpatched[at]
            patch = _Patch(None, None, written, None, sample=sample)
            return self._make(number, entry, "unpatched", positions, patch)
        index, kind = divmod(index - len(unpatched) * self._samples, len(self._kinds))
        index, sample = divmod(index, self._samples)
        index, scale = divmod(index, len(self._scales))
        layers = self._layers_of(one)
        place, pair = divmod(index, len(layers))
        width = len(one.target_positions or (None,))
        at, which = divmod(place, width)
        positions = one.source_positions[at]
        written = one.target_positions[which] if one.target_positions else positions
        layer, target_layer = layers[pair]
        control = self._kinds[kind]
        read = None
        if self._writes_state:
            shown = self._shown(entry, control)
            read = self._read(shown, min(at, len(shown.source_positions) - 1))
        patch = _Patch(read, layer, written, target_layer, self._scales[scale], sample)
        return self._make(number, entry, control, positions, patch)

    def _shown(self, entry: int, control: Control | None) -> Entry:
        """The entry whose state a cell is shown."""
        if control == "shuffled" and self._others is not None:
            return self._entries[self._others[entry]]
        return self._entries[entry]

    @staticmethod
    def _read(one: Entry, at: int) -> tuple[Source, Together, tuple[Weighted, ...]]:
        positions = one.source_positions[at]
        if not one.terms:
            return one.source, positions, ()
        more = ((term.prompt, term.positions[at], term.weight) for term in one.terms)
        return one.source, positions, ((one.source, positions, one.weight), *more)

    def _make(
        self,
        number: int,
        entry: int,
        control: Control | None,
        positions: Together,
        patch: _Patch,
    ) -> Cell:
        """`positions` are the entry's own, of which the last is compared."""
        one = self._entries[entry]
        source, read, terms = patch.source or (None, None, ())
        compares = self._resolver.compares
        digest = self._entry_digest(entry).copy()
        compared = positions if compares else None
        # A vector is the same one for every l.
        layer = None if isinstance(source, VectorAt) else patch.layer
        said: tuple[Any, ...] = (control, self._fingerprint(source), read, layer, *patch[2:4], compared)
        if terms or patch.scale != 1 or patch.sample:
            weighted = [(self._fingerprint(term), *rest) for term, *rest in terms]
            said = (*said, weighted, *patch[4:])
        digest.update(repr(said).encode())
        seed = int.from_bytes(digest.digest()[:7])
        unseen = one.unseen if patch.target_layer is not None else ()
        if unseen and control == "random":
            unseen = _other_tokens(unseen, patch.target_positions, seed)
        return Cell(
            number=number,
            row=one.row,
            entry=entry,
            control=control,
            source=source,
            source_positions=read,
            source_layer=patch.layer,
            terms=terms,
            target_prompt=one.target_prompt,
            target_positions=patch.target_positions,
            target_layer=patch.target_layer,
            scale=patch.scale,
            sample=patch.sample,
            unseen=unseen,
            reference=(prompt_of(one.source), positions[-1]) if compares else None,
            seed=seed,
        )

    def _fingerprint(self, source: Source | None) -> str | None:
        """A digest of a source's content, independent of its number."""
        if source is None:
            return None
        return str(source) if isinstance(source, VectorAt) else self._resolver.sources.digests[source]

    def _make_entry_digest(self, entry: int) -> Any:
        """What is the same for all cells of an entry, whichever it is."""
        one, resolver = self._entries[entry], self._resolver
        reference = self._fingerprint(one.source) if resolver.compares else None
        target = resolver.targets.digests[one.target_prompt]
        said = repr((target, reference, one.reference_ids, one.continuations, one.corrupted, one.unseen))
        return hashlib.sha256(self._said + said.encode())


def _only(positions: tuple[Together, ...] | None) -> Together:
    return positions[0] if positions else ()


def _other_tokens(unseen: Together, written: Together, seed: int) -> Together:
    """As many tokens that i* could see as are cut off from it, others if there are any."""
    free = [at for at in range(max(written)) if at not in unseen]
    return tuple(sorted(random.Random(seed).sample(free, min(len(free), len(unseen)))))  # noqa: S311 (seeded)


def _same(layer: int, shifts: int, depth: int) -> int:
    """The l* that is l, both counted as the sites count them."""
    if layer + shifts >= depth:
        raise LayerError(
            f"target.layer: same pairs layer {layer} of the source with layer {layer} of the target, "
            f"whose blocks are 0..{depth - 1}.",
            hint="Narrow source.layer, or give target.layer as a list.",
        )
    return layer + shifts


def _check_positions(positions: Together, written: Together) -> None:
    if len(written) != len(positions) != 1:
        raise PositionError(
            f"source.position names {len(positions)} tokens and target.position {len(written)}; several "
            "tokens are patched one to one.",
            hint="Name as many tokens on both sides, or one source token for all.",
        )


def _check_readout(readout: Readout, written: Together, count: int) -> None:
    named = f"readout.{readout.name}.position={readout.reads_at}"
    if not -count <= readout.reads_at < count:
        raise PositionError(
            f"{named} is outside the {count}-token target prompt.",
            hint="Use -1 for its last token.",
        )
    if readout.reads_at % count < min(written):
        raise PositionError(
            f"{named} stands before the patched position {min(written)}, where the patch cannot be seen.",
            hint="Read at the patched token or after it; -1 is the last.",
        )
