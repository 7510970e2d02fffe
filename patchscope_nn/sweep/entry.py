"""A resolved data row. Frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]
#: Positions that are patched together, in the order of the prompt.
PositionSet = tuple[int, ...]


class VectorAt(NamedTuple):
    """A vector in a file, resolved for a data row.

    Attributes:
        file: Path of the file.
        key: Name of the tensor; None if the file holds only one.
        row: Row of the tensor if it is a matrix; None if it is a vector.
    """

    file: str
    key: str | None
    row: int | None

    def __str__(self) -> str:
        row = "" if self.row is None else f"[{self.row}]"
        return f"{self.file}{f':{self.key}' if self.key else ''}{row}"


#: Where a state comes from: a source prompt, by its number, or a vector in a file.
Source = int | VectorAt


def prompt_of(source: Source | None) -> int:
    """Return the number of a source that is a prompt.

    Raises:
        TypeError: The source is not a prompt.
    """
    if isinstance(source, int):
        return source
    raise TypeError(f"{source!r} is not a source prompt")


class Term(NamedTuple):
    """A term of a weighted sum of states.

    Attributes:
        prompt: The number of its source prompt.
        positions: Where it is read: one position set for each of the entry's own `source_positions`.
        weight: Its weight.
    """

    prompt: int
    positions: tuple[PositionSet, ...]
    weight: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data row with one target prompt: what is read, where it is written, what it is compared with.

    A data row usually has one entry. It has more if there are several target prompts (an ensemble), if the
    target prompt names the layer l (one entry for each l), and with the `text-only` control (one entry for
    each text that replaces a state).

    Attributes:
        row: The number of the data row.
        source: S, the number of a prompt; or a vector from a file.
        source_positions: Every i that is swept.
        weight: The weight of the source's state; 1 unless `terms` are added to it.
        terms: The states that are added to it.
        target_prompt: T, the number of a prompt.
        target_positions: Every i* that is swept; None if i* is i.
        layer: If the entry is for a single l, the index of that l among all; None for all l.
        text_only: True if T holds the source's text, and nothing is written.
        corrupted: The tokens of T whose embeddings get noise.
        unseen: The tokens of T that i* cannot attend to, if attention is cut.
        reference_ids: The ids of the named reference tokens.
        choices: The texts of the choices.
        continuations: The token ids of the choices.
    """

    row: int
    source: Source
    source_positions: tuple[PositionSet, ...]
    weight: float = 1.0
    terms: tuple[Term, ...] = ()
    target_prompt: int
    target_positions: tuple[PositionSet, ...] | None
    layer: int | None = None
    text_only: bool = False
    corrupted: PositionSet = ()
    unseen: PositionSet = ()
    reference_ids: tuple[int, ...]
    choices: tuple[str, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def position_pairs(self) -> list[tuple[PositionSet, PositionSet]]:
        """Every (i, i*)."""
        return [
            (positions, written)
            for positions in self.source_positions
            for written in self.target_positions or (positions,)
        ]
