"""The data of a plan: passes, steps, optimisations. Frozen."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from patchscope_nn._util.arguments import checked_class
from patchscope_nn._util.ragged import Ints
from patchscope_nn.plan.layout import Layout
from patchscope_nn.sweep import CellBlock

Context: TypeAlias = Literal["fused", "session", "nested", "bridged"]


class SourcePass(NamedTuple):
    """One forward pass of M over a batch of source prompts.

    Attributes:
        prompts: The prompt of each row.
        states: The states that are read, in ascending order of layers (see `StateNumbers`).
        depth: How many blocks it runs through.
        whole: True if it runs through the whole model although no state needs that.
    """

    prompts: Ints
    states: Ints
    depth: int
    whole: bool = False


class TargetPass(NamedTuple):
    """One patched forward pass of M*, and what its readout runs after it.

    Attributes:
        cells: Its cells, as indices into `Step.cells`.
        layout: The layout of its packed sequence; None for a batch of whole, padded prompts.
    """

    cells: Ints
    layout: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One nnsight context. Remotely it is one job; if it fails, all of its cells do.

    Attributes:
        context: The kind of context.
        cells: The cells it runs.
        sources: The source passes.
        targets: The target passes.
        carried: States that it takes over from earlier steps.
        kept: States that it returns for later steps.
        dropped: States, kept by this or an earlier step, that no later step needs.
        prefix: The tokens that all its packed target passes begin with.
    """

    context: Context
    cells: CellBlock
    sources: tuple[SourcePass, ...]
    targets: tuple[TargetPass, ...]
    carried: Ints
    kept: Ints
    dropped: Ints
    prefix: tuple[int, ...] = ()

    @property
    def states(self) -> Ints:
        """The states it works with: first those it takes over, then those it reads."""
        return np.concatenate([self.carried, *(source_pass.states for source_pass in self.sources)])


@checked_class
@dataclass(frozen=True, kw_only=True)
class Optimisations:
    """What a plan may do to run fewer tokens and passes. No optimisation changes a result.

    Attributes:
        deduplication: Run equal cells of different data rows once.
        source_sharing: Run a source prompt once for all states that are read from it, only up to the deepest
            of them, in a batch with other prompts. Off: each state has its own forward pass.
        row_packing: Run many cells in a pass. Off: each cell has its own pass.
        cached_decoding: Decode from the prompt's keys and values. Off: each token reads its prompt again.
        mixed_lengths: Let prompts of different lengths share a pass. Off: the prompts of a pass have one
            length and need no padding.
        prefix_sharing: Run the tokens that target prompts begin with once.
        late_entry: Let a cell skip the blocks below l*.
        shared_attention: Attend to the shared prefix and to a cell's own tokens separately, so that more
            cells run together, and rows that decode hold the prefix's keys and values once for all.
        lean_readout: Unembed only the positions that are read.
        early_leaving: Let rows that have ended leave the batch while the others continue to decode.
        memory_reuse: On a CPU under Linux, keep the memory of one pass for the next instead of returning it
            to the system.
        overlap: In this process, prepare the next step and tabulate and write the previous one in a second
            thread while a step runs; not if users' metrics or columns are computed.
    """

    deduplication: bool = True
    source_sharing: bool = True
    row_packing: bool = True
    cached_decoding: bool = True
    mixed_lengths: bool = True
    prefix_sharing: bool = True
    late_entry: bool = True
    shared_attention: bool = True
    lean_readout: bool = True
    early_leaving: bool = True
    memory_reuse: bool = True
    overlap: bool = True

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the optimisations, in the order in which a plan applies them."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def none(cls) -> Optimisations:
        """Return all optimisations switched off."""
        return cls(**dict.fromkeys(cls.names(), False))
