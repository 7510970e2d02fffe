"""A sweep: a Patchscope over its data rows, layers and positions. Pure; no tensors, no weights.

1. resolve every row (`resolve.py`);
2. where states are averaged over rows, make one entry of them;
3. choose whose state each row is shown by `shuffled`;
4. pair sources with targets, and add the controls (`cells.py`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from patchscope_nn.errors import DataError, InputError, Problem, SpecError, did_you_mean
from patchscope_nn.models import Model, ModelInfo
from patchscope_nn.spec import Control, Patchscope
from patchscope_nn.spec.prompts import Encoded, dropped_notice
from patchscope_nn.sweep.cells import Cell, Cells
from patchscope_nn.sweep.entry import Entry, Row, Source, Term, VectorAt, prompt_of
from patchscope_nn.sweep.resolve import Resolver


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
        entries: The data rows, resolved.
        vectors: Every distinct vector from a file.
        shifts: What is added to l and l* to count them as the sites do: 1 for the input of a block.
        seed: What random numbers start from.
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
        """What a user should know of the prompts."""
        dropped = dict.fromkeys(prompt.dropped for prompt in (*self.source_prompts, *self.target_prompts))
        return tuple(dropped_notice(names) for names in dropped if names)

    def source_text(self, source: Source) -> str:
        """A source as text: its prompt, or where its vector is."""
        return str(source) if isinstance(source, VectorAt) else self.source_prompts[source].text

    def pairs(self, cell: Cell) -> Iterator[tuple[int, int]]:
        """Yield every (l, l*) a cell's state is mapped for: a window of one state maps it once."""
        own = self.scope.target.states == "own"
        for layer, target_layer in self.writes(cell):
            if layer is not None and cell.target_layer is not None:
                yield layer, target_layer if own else cell.target_layer

    def writes(self, cell: Cell) -> Iterator[tuple[int | None, int]]:
        """Yield every (l, l*) a cell writes: one, or those of a window that are in both models."""
        target = self.scope.target
        if cell.target_layer is None:
            return
        for step in range(target.window):
            layer, written = cell.source_layer, cell.target_layer + step
            if layer is not None and target.states == "own":
                layer += step
            if written < self.target.n_layers and (layer is None or layer < self.source.n_layers):
                yield layer, written


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
    states = [one for one in controls if one == "shuffled" or (one == "random" and mode != "cut")]
    if states and not scope.target.needs_state:
        raise SpecError(
            [
                Problem(
                    field="controls",
                    message=f"{states[0]} stands for a state, and target.write: {mode} writes none; "
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
    """One row for all, or for each value of a column: its states are the mean over the rows."""
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
    found: list[Entry] = []
    common: list[Row] = []
    for numbers in groups.values():
        first = rows[numbers[0]]
        common.append({k: v for k, v in first.items() if all(rows[one].get(k) == v for one in numbers)})
        for place, entry in enumerate(of_row[numbers[0]]):
            found.append(_mean([of_row[one][place] for one in numbers], row=len(common) - 1, entry=entry))
    return common, found


def _mean(entries: Sequence[Entry], *, row: int, entry: Entry) -> Entry:
    if len({_apart_from_source(one) for one in entries}) > 1:
        raise DataError(
            "source.mean: rows are averaged into one state, which is written into one target prompt and read "
            "out once, and what theirs ask for differs.",
            hint="Leave columns out of target and readout, or use those that all averaged rows share.",
        )
    sizes = {tuple(map(len, one.source_positions)) for one in entries}
    if len(sizes) > 1:
        raise DataError(
            "source.mean: rows are averaged position by position, and theirs are not as many.",
            hint="Name one position.",
        )
    weight = 1 / len(entries)
    terms = [Term(prompt_of(one.source), one.source_positions, weight) for one in entries[1:]]
    terms += [
        Term(term.prompt, term.positions, term.weight * weight) for one in entries for term in one.terms
    ]
    return replace(entry, row=row, weight=weight, terms=tuple(terms))


def _apart_from_source(one: Entry) -> Entry:
    return replace(one, row=0, source=0, source_positions=(), weight=1.0, terms=())


def _others(scope: Patchscope, entries: Sequence[Entry], *, seed: int) -> tuple[int, ...]:
    """For each entry the first one of another row, with another source, whose state it is shown instead."""
    first: dict[int, int] = {}
    for number, entry in enumerate(entries):
        first.setdefault(entry.row, number)
    order = list(first)
    random.Random(seed).shuffle(order)  # noqa: S311 (a seeded choice, no secret)
    place = {row: index for index, row in enumerate(order)}
    averaged = scope.source.mean == "positions"
    others = []
    for number, one in enumerate(entries):
        if one.text_only:
            others.append(number)
            continue
        turned = (first[order[(place[one.row] + step) % len(order)]] for step in range(1, len(order)))
        fit = (other for other in turned if _can_stand_in(entries[other], one, averaged=averaged))
        other = next(fit, None)
        if other is None:
            raise DataError(
                f"controls: shuffled shows data row {one.row} the state of another row with another source "
                "prompt and as many positions, and there is none.",
                hint="Give more rows (raise --limit), or leave shuffled out.",
            )
        others.append(other)
    return tuple(others)


def _can_stand_in(other: Entry, one: Entry, *, averaged: bool) -> bool:
    """Whether it reads another source, and gives as many states; of what is averaged there is one."""
    sizes = [
        [1 if averaged else len(together) for together in entry.source_positions] for entry in (other, one)
    ]
    fits = all(size == sizes[0][min(place, len(sizes[0]) - 1)] for place, size in enumerate(sizes[1]))
    another = (other.source, other.terms) != (one.source, one.terms)
    return another and fits
