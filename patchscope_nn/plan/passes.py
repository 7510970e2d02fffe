"""What a plan is made of: states, passes, steps. Frozen data, printable as a tree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from patchscope_nn.cells import Cell, Sweep
from patchscope_nn.plan.layout import Layout

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
    """

    prompts: tuple[int, ...]
    states: tuple[State, ...]


class TargetPass(NamedTuple):
    """One patched forward of M* (and what its readout runs after it).

    Attributes:
        cells: Its cells, as places in `Plan.cells`.
        layout: Where each stands in one packed sequence; None for a batch of whole, padded prompts.
    """

    cells: tuple[int, ...]
    layout: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One context.

    Attributes:
        context: How it is opened.
        sources: Source passes.
        targets: Target passes.
        carried: States that come in from earlier steps.
        kept: States that go out to later ones.
        prefix: The (T, number of tokens) that all its packed target passes begin with; None for none.
    """

    context: Context
    sources: tuple[SourcePass, ...]
    targets: tuple[TargetPass, ...]
    carried: tuple[State, ...] = ()
    kept: tuple[State, ...] = ()
    prefix: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Optimisations:
    """What a plan may do to run fewer tokens and passes. None of it changes a result.

    Attributes:
        packing: Run only what differs between cells, as segments of one sequence (see `layout.py`); off,
            each cell is a row of a batch of whole, padded prompts, and the next two have no effect.
        prefix_sharing: Run what a step's target prompts begin with once.
        late_entry: Let a cell skip the blocks below l*.
        deduplication: Run equal cells of different data rows once.
        early_leaving: Let rows that met their end leave the batch while the others generate on.
    """

    packing: bool = True
    prefix_sharing: bool = True
    late_entry: bool = True
    deduplication: bool = True
    early_leaving: bool = True

    @classmethod
    def none(cls) -> Optimisations:
        """Every one of them off."""
        return cls(**dict.fromkeys(cls.__dataclass_fields__, False))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run.

    Attributes:
        sweep: The sweep it serves.
        cells: The cells that are to be run, in order.
        steps: The contexts, in order.
        max_rows: The most rows of a pass.
        max_tokens: The most tokens of a pass, padding included.
        optimisations: What it does to run less.
        copies: For a cell that runs for others too, these others' places in `cells`.
    """

    sweep: Sweep = field(repr=False)
    cells: tuple[Cell, ...] = field(repr=False)
    steps: tuple[Step, ...]
    max_rows: int
    max_tokens: int
    optimisations: Optimisations
    copies: Mapping[int, tuple[int, ...]] = field(repr=False)

    @property
    def digest(self) -> str:
        """Hex digest of the cells and of the passes that serve them."""
        said = ([cell.key for cell in self.cells], self.steps, self.optimisations)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    def totals(self) -> dict[str, int]:
        """Count what will run.

        Returns:
            Cells, steps, passes, rows, and tokens (padding included); `target_blocks` is how many tokens go
            through how many blocks of M*, summed, before the readouts.
        """
        sources = [one for step in self.steps for one in step.sources]
        targets = [one for step in self.steps for one in step.targets]
        prefixes = sum(step.prefix[1] for step in self.steps if step.prefix)
        depth = self.sweep.target.n_layers
        return {
            "cells": len(self.cells),
            "steps": len(self.steps),
            "source_passes": len(sources),
            "source_rows": sum(len(one.prompts) for one in sources),
            "source_tokens": sum(self.source_width(one) * len(one.prompts) for one in sources),
            "states": sum(len(one.states) for one in sources),
            "target_passes": len(targets),
            "target_rows": sum(len(one.cells) for one in targets),
            "target_tokens": prefixes + sum(self.target_tokens(one) for one in targets),
            "target_blocks": depth * prefixes + sum(self.target_blocks(one) for one in targets),
        }

    def target_tokens(self, one: TargetPass) -> int:
        """The tokens of a target pass, before its readout."""
        return one.layout.n_tokens if one.layout else self.target_width(one) * len(one.cells)

    def target_blocks(self, one: TargetPass) -> int:
        """How many tokens of a target pass go through how many blocks, summed."""
        depth = self.sweep.target.n_layers
        if one.layout is None:
            return depth * self.target_tokens(one)
        return sum(one.layout.running(layer - 1) for layer in range(one.layout.depth))

    def source_width(self, one: SourcePass) -> int:
        """The tokens of a pass's rows, padded to the longest."""
        return max(len(self.sweep.source_prompts[prompt].ids) for prompt in one.prompts)

    def target_width(self, one: TargetPass) -> int:
        """The same of a target pass, before its readout."""
        prompts = (self.cells[cell].target_prompt for cell in one.cells)
        return max(len(self.sweep.target_prompts[prompt].ids) for prompt in prompts)

    def width(self, step: Step) -> int:
        """The tokens of a step's longest row on either side."""
        return max(*map(self.source_width, step.sources), *map(self.target_width, step.targets))

    def __str__(self) -> str:
        from patchscope_nn.plan.text import render_plan

        return render_plan(self)
