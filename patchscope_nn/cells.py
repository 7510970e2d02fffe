"""Cells: a Patchscope over its data rows, layers and positions. Pure; no tensors, no weights.

1. resolve every row (`resolve.py`);
2. pair sources with targets;
3. add the controls.

A cell refers to prompts by number, so that a hundred thousand of them stay small.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from patchscope_nn.errors import DataError, InputError, LayerError, PositionError
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.prompts import Encoded
from patchscope_nn.resolve import ResolvedRow, Resolver, Row, Together
from patchscope_nn.spec import Control, NextToken, Patchscope


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One fully resolved combination; `None` stands for what an unpatched run does not have.

    Attributes:
        key: What this cell is, as a digest: the same cell of the same run has the same key.
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

    key: str
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


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All the cells of a Patchscope, and the prompts they speak of.

    Attributes:
        scope: The Patchscope.
        source: What is known of M.
        target: What is known of M*.
        source_prompts: Every distinct S.
        target_prompts: Every distinct T.
        cells: The cells, in the order of the data's rows.
        rows: The data rows.
        resolved: The data rows, resolved.
    """

    scope: Patchscope
    source: ModelInfo
    target: ModelInfo
    source_prompts: tuple[Encoded, ...] = field(repr=False)
    target_prompts: tuple[Encoded, ...] = field(repr=False)
    cells: tuple[Cell, ...] = field(repr=False)
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
    maker = _Maker(resolver, target.info, seed=seed)
    cells = tuple(
        cell
        for number, one in enumerate(resolved)
        for cell in maker.cells(number, one, controls, resolved[others[number]] if others else None)
    )
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


class _Write(NamedTuple):
    """What is written where: the (prompt, positions, layer) that is read, i*, and l*; None for nothing."""

    source: tuple[int, Together, int] | None
    target_positions: Together
    target_layer: int | None


class _Maker:
    """Steps 2 and 3: pairs and their controls, each with its key."""

    def __init__(self, resolver: Resolver, target: ModelInfo, *, seed: int) -> None:
        self.resolver, self.depth = resolver, target.n_layers
        self.said = repr((resolver.scope.model_dump(mode="json"), seed))

    def cells(
        self, row: int, one: ResolvedRow, controls: Sequence[Control], other: ResolvedRow | None
    ) -> Iterator[Cell]:
        pairs = list(self._pairs(one))
        if "unpatched" in controls:
            # Where nothing is compared, the source's position makes no difference to an unpatched run.
            own = [one.source_positions[place if self.resolver.compares else 0] for place, *_ in pairs]
            for positions, written in dict.fromkeys(zip(own, (pair[2] for pair in pairs), strict=True)):
                yield self._cell(row, one, "unpatched", positions, _Write(None, written, None))
        for place, layer, written, target_layer in pairs:
            positions = one.source_positions[place]
            patch = _Write((one.source_prompt, positions, layer), written, target_layer)
            yield self._cell(row, one, None, positions, patch)
            if "random" in controls:
                yield self._cell(row, one, "random", positions, patch)
            if other is not None:
                theirs = other.source_positions[min(place, len(other.source_positions) - 1)]
                shuffled = _Write((other.source_prompt, theirs, layer), written, target_layer)
                yield self._cell(row, one, "shuffled", positions, shuffled)

    def _pairs(self, one: ResolvedRow) -> Iterator[tuple[int, int, Together, int]]:
        """Yield (which source position, l, i*, l*) for every real cell."""
        count = len(self.resolver.targets.encoded[one.target_prompt].ids)
        for place, positions in enumerate(one.source_positions):
            for written in one.target_positions or (positions,):
                self._check(positions, written, count)
                for layer in self.resolver.layers:
                    for target_layer in self.resolver.target_layers or (self._same(layer),):
                        yield place, layer, written, target_layer

    def _same(self, layer: int) -> int:
        if layer >= self.depth:
            raise LayerError(
                f"target.layer: same pairs layer {layer} of the source with layer {layer} of the target, "
                f"whose blocks are 0..{self.depth - 1}.",
                hint="Narrow source.layer, or give target.layer as a list.",
            )
        return layer

    def _check(self, positions: Together, written: Together, count: int) -> None:
        if len(written) != len(positions):
            raise PositionError(
                f"source.position names {len(positions)} tokens and target.position {len(written)}; several "
                "tokens are patched one to one.",
                hint="Name as many tokens on both sides.",
            )
        readout = self.resolver.scope.readout
        if not isinstance(readout, NextToken):
            return
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

    def _cell(
        self, row: int, one: ResolvedRow, control: Control | None, positions: Together, patch: _Write
    ) -> Cell:
        """`positions` are the row's own, of which the last is compared."""
        (prompt, read, layer), written, target_layer = patch.source or (None, None, None), *patch[1:]
        reference = (one.source_prompt, positions[-1]) if self.resolver.compares else None
        sources, targets = self.resolver.sources, self.resolver.targets
        content = (
            self.said,
            control,
            None if prompt is None else sources.digests[prompt],
            (read, layer, targets.digests[one.target_prompt], written, target_layer),
            (sources.digests[one.source_prompt], positions, reference and reference[1]),
            (one.reference_ids, one.continuations),
        )
        digest = hashlib.sha256(repr(content).encode()).hexdigest()
        return Cell(
            key=hashlib.sha256(f"{row} {digest}".encode()).hexdigest()[:16],
            row=row,
            control=control,
            source_prompt=prompt,
            source_positions=read,
            source_layer=layer,
            target_prompt=one.target_prompt,
            target_positions=written,
            target_layer=target_layer,
            reference=reference,
            seed=int(digest[:15], 16),
        )
