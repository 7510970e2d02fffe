"""Cells: a Patchscope over its data rows, layers and positions. Pure; no tensors, no weights.

1. resolve every row (`resolve.py`);
2. pair sources with targets;
3. add the controls.

A cell is made when it is asked for, and refers to prompts by number: a sweep of a hundred thousand cells
holds its data rows and no cell.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, overload

from patchscope_nn.errors import DataError, InputError, LayerError, PositionError
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.prompts import Encoded
from patchscope_nn.resolve import ResolvedRow, Resolver, Row, Together
from patchscope_nn.spec import Control, NextToken, Patchscope


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One fully resolved combination; `None` stands for what an unpatched run does not have.

    Attributes:
        number: Its place in the sweep.
        row: The data row it answers for.
        control: None for the real cell, else the control's name.
        source_prompt: S, a number in `Sweep.source_prompts`.
        source_positions: i, from the left; several are patched together.
        source_layer: l; -1 is the input of block 0.
        target_prompt: T, a number in `Sweep.target_prompts`.
        target_positions: i*, as many as i.
        target_layer: l*.
        reference: The (prompt, position) whose unpatched next-token distribution it is compared with.
        seed: A digest of what this cell is, whatever its row: what its random numbers start from. Cells
            with the same seed are the same run.
    """

    number: int
    row: int
    control: Control | None
    source_prompt: int | None
    source_positions: Together | None
    source_layer: int | None
    target_prompt: int
    target_positions: Together
    target_layer: int | None
    reference: tuple[int, int] | None
    seed: int


class _Patch(NamedTuple):
    """What is written where: the (prompt, positions, layer) that is read, i*, and l*; None for nothing."""

    source: tuple[int, Together, int] | None
    target_positions: Together
    target_layer: int | None


class _Unpatched(NamedTuple):
    """An unpatched run: the source position it is compared at, and what of T it leaves as it is."""

    positions: Together
    written: Together


class Cells(Sequence[Cell]):
    """The cells of a sweep, in the order of the data's rows, each made when it is asked for.

    A row's cells are its unpatched ones, then for every (i, i*, l, l*) the real one and its controls.

    Args:
        resolver: What resolved the rows.
        resolved: The rows.
        others: For each row the one whose state it is shown by `shuffled`; None where that is not asked.
        controls: The controls.
        depth: The number of blocks of M*.
        seed: What random numbers start from.

    Raises:
        InputError: Positions, layers or the readout do not go together in some row.
    """

    def __init__(
        self,
        resolver: Resolver,
        resolved: Sequence[ResolvedRow],
        others: Sequence[int] | None,
        *,
        controls: Sequence[Control],
        depth: int,
        seed: int,
    ) -> None:
        self._resolver, self._resolved, self._others = resolver, resolved, others
        self._kinds: tuple[Control | None, ...] = (None, *(one for one in controls if one != "unpatched"))
        self._unpatched_too = "unpatched" in controls
        self._said = repr((resolver.scope.model_dump(mode="json"), seed)).encode()
        self._layers = [
            (layer, target_layer)
            for layer in resolver.layers
            for target_layer in resolver.target_layers or (_same(layer, depth),)
        ]
        for one in resolved:
            self._check(one)
        sizes = (
            len(self._unpatched(one)) + len(self._places(one)) * len(self._layers) * len(self._kinds)
            for one in resolved
        )
        self._starts = [0, *itertools.accumulate(sizes)]
        self._row_digest = lru_cache(maxsize=4)(self._make_row_digest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Cell]:
        for row in range(len(self._resolved)):
            yield from self.of_row(row)

    @overload
    def __getitem__(self, place: int) -> Cell: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Cell, ...]: ...
    def __getitem__(self, place: int | slice) -> Cell | tuple[Cell, ...]:
        if isinstance(place, slice):
            return tuple(self[one] for one in range(*place.indices(len(self))))
        number = range(len(self))[place]
        row = bisect_right(self._starts, number) - 1
        return self._cell(row, number - self._starts[row])

    @property
    def layers(self) -> tuple[int, ...]:
        """Every l."""
        return self._resolver.layers

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (l, l*)."""
        return tuple(self._layers)

    @property
    def compares(self) -> bool:
        """Whether cells are compared with the source's own next-token distribution."""
        return self._resolver.compares

    def of_row(self, row: int) -> Iterator[Cell]:
        """The cells of one data row."""
        for index in range(self._starts[row + 1] - self._starts[row]):
            yield self._cell(row, index)

    def sources(self, row: int) -> Iterator[tuple[int, tuple[Together, ...]]]:
        """Yield every (S, positions i) that the cells of a row read."""
        yield self._resolved[row].source_prompt, self._resolved[row].source_positions
        if self._others is not None:
            other = self._resolved[self._others[row]]
            yield other.source_prompt, other.source_positions

    def _unpatched(self, one: ResolvedRow) -> list[_Unpatched]:
        if not self._unpatched_too:
            return []
        # Where nothing is compared, the source's position makes no difference to an unpatched run.
        compared = self._resolver.compares
        places = self._places(one)
        found = ((positions if compared else places[0][0], written) for positions, written in places)
        return [_Unpatched(*pair) for pair in dict.fromkeys(found)]

    @staticmethod
    def _places(one: ResolvedRow) -> list[tuple[Together, Together]]:
        """Every (i, i*) of a row."""
        return [
            (positions, written)
            for positions in one.source_positions
            for written in one.target_positions or (positions,)
        ]

    def _check(self, one: ResolvedRow) -> None:
        count = len(self._resolver.targets.encoded[one.target_prompt].ids)
        for positions, written in self._places(one):
            _check_positions(positions, written)
            if isinstance(self._resolver.scope.readout, NextToken):
                _check_readout(self._resolver.scope.readout, written, count)

    def _cell(self, row: int, index: int) -> Cell:
        one = self._resolved[row]
        unpatched = self._unpatched(one) if self._unpatched_too else []
        number = self._starts[row] + index
        if index < len(unpatched):
            positions, written = unpatched[index]
            return self._make(number, row, "unpatched", positions, _Patch(None, written, None))
        index, kind = divmod(index - len(unpatched), len(self._kinds))
        place, pair = divmod(index, len(self._layers))
        width = len(one.target_positions or (None,))
        at, which = divmod(place, width)
        positions = read = one.source_positions[at]
        written = one.target_positions[which] if one.target_positions else positions
        layer, target_layer = self._layers[pair]
        prompt, control = one.source_prompt, self._kinds[kind]
        if control == "shuffled" and self._others is not None:
            other = self._resolved[self._others[row]]
            prompt = other.source_prompt
            read = other.source_positions[min(at, len(other.source_positions) - 1)]
        patch = _Patch((prompt, read, layer), written, target_layer)
        return self._make(number, row, control, positions, patch)

    def _make(
        self, number: int, row: int, control: Control | None, positions: Together, patch: _Patch
    ) -> Cell:
        """`positions` are the row's own, of which the last is compared."""
        one = self._resolved[row]
        (prompt, read, layer), written, target_layer = patch.source or (None, None, None), *patch[1:]
        compares = self._resolver.compares
        digest = self._row_digest(row).copy()
        source = None if prompt is None else self._resolver.sources.digests[prompt]
        compared = positions if compares else None
        digest.update(repr((control, source, read, layer, written, target_layer, compared)).encode())
        return Cell(
            number=number,
            row=row,
            control=control,
            source_prompt=prompt,
            source_positions=read,
            source_layer=layer,
            target_prompt=one.target_prompt,
            target_positions=written,
            target_layer=target_layer,
            reference=(one.source_prompt, positions[-1]) if compares else None,
            seed=int.from_bytes(digest.digest()[:7]),
        )

    def _make_row_digest(self, row: int) -> Any:
        """What is the same for all cells of a row, whichever row it is."""
        one, resolver = self._resolved[row], self._resolver
        reference = resolver.sources.digests[one.source_prompt] if resolver.compares else None
        target = resolver.targets.digests[one.target_prompt]
        said = repr((target, reference, one.reference_ids, one.continuations)).encode()
        return hashlib.sha256(self._said + said)


def _same(layer: int, depth: int) -> int:
    if layer >= depth:
        raise LayerError(
            f"target.layer: same pairs layer {layer} of the source with layer {layer} of the target, "
            f"whose blocks are 0..{depth - 1}.",
            hint="Narrow source.layer, or give target.layer as a list.",
        )
    return layer


def _check_positions(positions: Together, written: Together) -> None:
    if len(written) != len(positions):
        raise PositionError(
            f"source.position names {len(positions)} tokens and target.position {len(written)}; several "
            "tokens are patched one to one.",
            hint="Name as many tokens on both sides.",
        )


def _check_readout(readout: NextToken, written: Together, count: int) -> None:
    if not -count <= readout.position < count:
        raise PositionError(
            f"readout.next_token.position={readout.position} is outside the {count}-token target prompt.",
            hint="Use -1 for its last token.",
        )
    if readout.position % count < min(written):
        raise PositionError(
            f"readout.next_token.position={readout.position} stands before the patched position "
            f"{min(written)}, where the patch cannot be seen.",
            hint="Read at the patched token or after it; -1 is the last.",
        )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All the cells of a Patchscope, and the prompts they speak of.

    Attributes:
        scope: The Patchscope.
        source: What is known of M.
        target: What is known of M*.
        source_prompts: Every distinct S.
        target_prompts: Every distinct T.
        cells: The cells, in the order of the data's rows, made as they are asked for.
        rows: The data rows.
        resolved: The data rows, resolved.
    """

    scope: Patchscope
    source: ModelInfo
    target: ModelInfo
    source_prompts: tuple[Encoded, ...] = field(repr=False)
    target_prompts: tuple[Encoded, ...] = field(repr=False)
    cells: Cells = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)
    resolved: tuple[ResolvedRow, ...] = field(repr=False)


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
        controls: `unpatched` adds one cell for each row and T; `random` and `shuffled` one for each cell.
        source: M; only its description and tokenizer are used.
        target: M*; the same.
        seed: What random states, the choice of other rows and sampling start from.

    Returns:
        The sweep.

    Raises:
        InputError: A prompt, position, layer, site or reference does not resolve; the message names the
            field and, where there are several, the data row.
    """
    if not rows:
        raise DataError("the data holds no row.", hint="Give at least one, or raise --limit.")
    resolver = Resolver(scope, source, target)
    resolved = tuple(_numbered(resolver, row, number, len(rows)) for number, row in enumerate(rows))
    others = _others(resolved, seed=seed) if "shuffled" in controls else None
    cells = Cells(resolver, resolved, others, controls=controls, depth=target.info.n_layers, seed=seed)
    return Sweep(
        scope=scope,
        source=source.info,
        target=target.info,
        source_prompts=tuple(resolver.sources.encoded),
        target_prompts=tuple(resolver.targets.encoded),
        cells=cells,
        rows=tuple(rows),
        resolved=resolved,
    )


def _numbered(resolver: Resolver, row: Row, number: int, count: int) -> ResolvedRow:
    try:
        return resolver.resolve(row)
    except InputError as error:
        if count == 1:
            raise
        raise type(error)(f"data row {number}: {error.message}", hint=error.hint) from error


def _others(resolved: Sequence[ResolvedRow], *, seed: int) -> tuple[int, ...]:
    """For each row another one, with another source prompt, whose state it is shown instead."""
    order = list(range(len(resolved)))
    random.Random(seed).shuffle(order)  # noqa: S311 (a seeded choice, no secret)
    place = {number: index for index, number in enumerate(order)}
    others = []
    for number, one in enumerate(resolved):
        turned = (order[(place[number] + step) % len(order)] for step in range(1, len(order)))
        other = next((other for other in turned if _can_stand_in(resolved[other], one)), None)
        if other is None:
            raise DataError(
                f"controls: shuffled shows data row {number} the state of another row with another source "
                "prompt and as many positions, and there is none.",
                hint="Give more rows (raise --limit), or leave shuffled out.",
            )
        others.append(other)
    return tuple(others)


def _can_stand_in(other: ResolvedRow, one: ResolvedRow) -> bool:
    sizes = [[len(together) for together in row.source_positions] for row in (other, one)]
    fits = all(size == sizes[0][min(place, len(sizes[0]) - 1)] for place, size in enumerate(sizes[1]))
    return other.source_prompt != one.source_prompt and fits
