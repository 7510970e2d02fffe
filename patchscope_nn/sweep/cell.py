"""One cell of a sweep. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from patchscope_nn.spec import Control
from patchscope_nn.sweep.entry import PositionSet, Source

#: A term of a weighted sum of states: its source, its positions and its weight.
Weighted = tuple[Source, PositionSet, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One fully resolved combination of a source state, a place to write it, and a control.

    A field is `None` if the run lacks that part: an unpatched run has no source and no l*, and a write that
    needs no state has no source.

    Attributes:
        number: Its index in the sweep.
        row: The data row it belongs to.
        entry: Index of its entry in `Sweep.entries`.
        control: None for the real cell, else the control's name.
        source: S, an index into `Sweep.source_prompts`; or a vector from a file.
        source_positions: i, in ascending order. Several positions are patched together.
        source_layer: l; -1 is the input of block 0.
        terms: All terms, if the written state is a sum of several states; else empty.
        target_prompt: T, an index into `Sweep.target_prompts`.
        target_positions: i*, as many as i.
        target_layer: l*.
        scale: The factor that multiplies the mapped state.
        sample: Which draw of the noise on T's embeddings.
        unseen: The tokens that i* cannot attend to.
        reference: The (prompt, position) whose unpatched next-token distribution the cell is compared with.
        seed: A digest of the cell's content, independent of its row. It seeds the cell's random numbers.
            Cells with the same seed are the same run.
    """

    number: int
    row: int
    entry: int
    control: Control | None
    source: Source | None
    source_positions: PositionSet | None
    source_layer: int | None
    terms: tuple[Weighted, ...]
    target_prompt: int
    target_positions: PositionSet
    target_layer: int | None
    scale: float
    sample: int
    unseen: PositionSet
    reference: tuple[int, int] | None
    seed: int
