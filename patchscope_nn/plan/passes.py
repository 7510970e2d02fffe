"""What a plan is made of: states, passes, steps. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from patchscope_nn._util.arguments import checked_class
from patchscope_nn.plan.layout import Layout
from patchscope_nn.sweep import Cell

Context: TypeAlias = Literal["fused", "session", "nested", "bridged"]


class State(NamedTuple):
    """What a source pass reads: a hidden state, or (layer None) the final next-token distribution.

    Attributes:
        prompt: S, a number.
        positions: i, from the left.
        layer: l; None for the distribution after the last of the positions.
    """

    prompt: int
    positions: tuple[int, ...]
    layer: int | None


class SourcePass(NamedTuple):
    """One forward of M over a batch of source prompts.

    Attributes:
        prompts: The batch's rows.
        states: What is read.
        whole: Whether it runs to its end, and not just as deep as is read.
    """

    prompts: tuple[int, ...]
    states: tuple[State, ...]
    whole: bool = False

    def depth(self, n_layers: int) -> int:
        """How many blocks it runs through."""
        layers = [state.layer for state in self.states]
        if self.whole or None in layers:
            return n_layers
        return 1 + max(0, *(layer for layer in layers if layer is not None))


class TargetPass(NamedTuple):
    """One patched forward of M* (and what its readout runs after it).

    Attributes:
        cells: Its cells, as places in `Step.cells`.
        layout: Where each stands in one packed sequence; None for a batch of whole, padded prompts.
    """

    cells: tuple[int, ...]
    layout: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One context: what is done together, or lost together.

    Attributes:
        context: How it is opened.
        cells: The cells it runs.
        sources: Source passes.
        targets: Target passes.
        carried: States that come in from earlier steps.
        kept: States that go out to later ones.
        dropped: States, kept by this or an earlier step, that no later one needs.
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
        """The state numbers of the step's program: of the states it takes over, then of those it reads."""
        fresh = (state for source_pass in self.sources for state in source_pass.states)
        return {state: number for number, state in enumerate([*self.carried, *fresh])}


@checked_class
@dataclass(frozen=True, kw_only=True)
class Optimisations:
    """What a plan may do to run fewer tokens and passes. None of it changes a result.

    Attributes:
        deduplication: Run equal cells of different data rows once.
        source_sharing: Run a source prompt once for all that is read of it, no deeper than that, in a batch
            with others; off, each state has a forward of its own.
        row_packing: Run many cells in a pass; off, each has its own.
        cached_decoding: Decode from the prompt's keys and values; off, every token reads its prompt again.
        mixed_lengths: Let prompts of different lengths share a pass; off, a pass holds prompts of one length
            and needs no padding.
        prefix_sharing: Run what target prompts begin with once.
        late_entry: Let a cell skip the blocks below l*.
        shared_attention: Attend to what cells share apart from what is their own, on a CPU, so that more of
            them run together.
        lean_readout: Unembed only the positions that are read.
        early_leaving: Let rows that met their end leave the batch while the others generate on.
        memory_reuse: Keep the memory of one pass for the next, on a CPU under Linux, and do not return it to
            the system each time.
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
        """The names of the optimisations, in the order in which a plan applies them."""
        return tuple(one.name for one in fields(cls))

    @classmethod
    def none(cls) -> Optimisations:
        """Every one of them off."""
        return cls(**dict.fromkeys(cls.names(), False))
