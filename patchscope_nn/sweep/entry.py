"""What a data row is once it is resolved. Frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]
#: The positions that are patched together, from the left.
Together = tuple[int, ...]


class VectorAt(NamedTuple):
    """A vector in a file, resolved for a data row."""

    file: str
    key: str | None
    row: int | None

    def __str__(self) -> str:
        place = "" if self.row is None else f"[{self.row}]"
        return f"{self.file}{f':{self.key}' if self.key else ''}{place}"


#: What a state is taken from: a source prompt, by its number, or a vector in a file.
Source = int | VectorAt


def prompt_of(source: Source | None) -> int:
    """The number of a source that is a prompt.

    Raises:
        TypeError: It is not one.
    """
    if isinstance(source, int):
        return source
    raise TypeError(f"{source!r} is not a source prompt")


class Term(NamedTuple):
    """One of several states that are added up to what is written.

    Attributes:
        prompt: A source prompt, a number.
        positions: Where it is read, one entry for each of the entry's own `source_positions`.
        weight: What it is multiplied with.
    """

    prompt: int
    positions: tuple[Together, ...]
    weight: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data row with one target prompt: what it reads, what it writes, and what it is compared with.

    A data row has an entry for each prompt of an ensemble, for each l where the target prompt names l, and
    for each text that stands in the place of a state (`text-only`).

    Attributes:
        row: The data row.
        source: S, the number of a prompt; or a vector from a file.
        source_positions: i, one for each cell.
        weight: What the state is multiplied with; not 1 where `terms` are added to it.
        terms: What is added to it.
        target_prompt: T, a number.
        target_positions: i*, one for each cell; None where it is the source's own.
        layer: The place of the only l it is for, among all l; None for all.
        text_only: Whether T holds the source's text, and nothing is written.
        corrupted: The tokens of T whose embeddings are disturbed.
        unseen: The tokens of T that i* does not see, where attention is cut.
        reference_ids: Ids of the named reference tokens.
        choices: The texts of the choices.
        continuations: Their ids.
    """

    row: int
    source: Source
    source_positions: tuple[Together, ...]
    weight: float = 1.0
    terms: tuple[Term, ...] = ()
    target_prompt: int
    target_positions: tuple[Together, ...] | None
    layer: int | None = None
    text_only: bool = False
    corrupted: Together = ()
    unseen: Together = ()
    reference_ids: tuple[int, ...]
    choices: tuple[str, ...]
    continuations: tuple[tuple[int, ...], ...]
