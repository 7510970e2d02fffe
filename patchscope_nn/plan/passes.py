"""The data of a plan: states, passes, steps, optimisations. Frozen."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from patchscope_nn._util.arguments import checked_class
from patchscope_nn.plan.layout import Layout
from patchscope_nn.sweep import Cell

Context: TypeAlias = Literal["fused", "session", "nested", "bridged"]


class State(NamedTuple):
    """Something that a source pass reads: hidden states, or a next-token distribution.

    Attributes:
        prompt: S, the number of a prompt.
        positions: i, in the order of the prompt.
        layer: l; None for the distribution after the last of the positions.
    """

    prompt: int
    positions: tuple[int, ...]
    layer: int | None


class SourcePass(NamedTuple):
    """One forward pass of M over a batch of source prompts.

    Attributes:
        prompts: The prompt of each row.
        states: The states that are read.
        whole: True if it runs through the whole model; else it stops after the last state.
    """

    prompts: tuple[int, ...]
    states: tuple[State, ...]
    whole: bool = False

    def depth(self, n_layers: int) -> int:
        """Return how many blocks it runs through."""
        layers = [state.layer for state in self.states]
        if self.whole or None in layers:
            return n_layers
        return 1 + max(0, *(layer for layer in layers if layer is not None))


class TargetPass(NamedTuple):
    """One patched forward pass of M*, and what its readout runs after it.

    Attributes:
        cells: Its cells, as indices into `Step.cells`.
        layout: The layout of its packed sequence; None for a batch of whole, padded prompts.
    """

    cells: tuple[int, ...]
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
    cells: tuple[Cell, ...]
    sources: tuple[SourcePass, ...]
    targets: tuple[TargetPass, ...]
    carried: tuple[State, ...] = ()
    kept: tuple[State, ...] = ()
    dropped: tuple[State, ...] = ()
    prefix: tuple[int, ...] = ()

    @cached_property
    def numbers(self) -> dict[State, int]:
        """{state: its number in the step's program}: first the states it takes over, then those it reads."""
        fresh = (state for source_pass in self.sources for state in source_pass.states)
        return {state: number for number, state in enumerate([*self.carried, *fresh])}


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
        shared_attention: On a CPU, attend to the shared prefix and to a cell's own tokens separately, so that
            more cells run together.
        lean_readout: Unembed only the positions that are read.
        early_leaving: Let rows that have ended leave the batch while the others continue to decode.
        memory_reuse: On a CPU under Linux, keep the memory of one pass for the next instead of returning it
            to the system.
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

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the optimisations, in the order in which a plan applies them."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def none(cls) -> Optimisations:
        """Return all optimisations switched off."""
        return cls(**dict.fromkeys(cls.names(), False))
