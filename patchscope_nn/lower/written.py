"""Numbers the states that a step writes: states that it reads, vectors from files, and sums of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from patchscope_nn.body.program import Sum
from patchscope_nn.plan import Plan, State, terms_of
from patchscope_nn.sweep import Cell, Source, VectorAt
from patchscope_nn.sweep.vectors import load_soft_prompt, load_vector


class WrittenStates:
    """The states that a step writes, each with its state number.

    Args:
        plan: The plan.
        numbers: The numbers of the states that the step reads or takes over. Other states get the next ones.

    Attributes:
        numbers: The same.
        given: Vectors from files, by number.
        sums: The states that are sums of others.
        soft: The number of the soft prompt; None without one.
    """

    def __init__(self, plan: Plan, numbers: Mapping[State, int]) -> None:
        self.sweep, self.numbers = plan.sweep, numbers
        self.given: dict[int, torch.Tensor] = {}
        self.sums: list[Sum] = []
        self._next = len(numbers)
        self._known: dict[Any, int] = {}
        self._vectors: dict[VectorAt, int] = {}
        soft = plan.sweep.scope.target.soft_prompt
        self.soft = self._given(load_soft_prompt(soft)) if soft else None

    def number(self, cell: Cell, layer: int | None) -> int | None:
        """Return the number of the state that a cell writes for a layer l; None if it writes no state."""
        terms = terms_of(cell)
        if not terms:
            return None
        mean = self.sweep.scope.source.mean == "positions"
        if len(terms) == 1 and not cell.terms and not mean:
            return self._term(terms[0][0], terms[0][1], layer)
        key = (terms, layer)
        if key not in self._known:
            parts = [(self._term(prompt, positions, layer), weight) for prompt, positions, weight in terms]
            self._known[key] = self._take()
            self.sums.append({"state": self._known[key], "terms": parts, "mean": mean})
        return self._known[key]

    def _term(self, source: Source, positions: tuple[int, ...], layer: int | None) -> int:
        if not isinstance(source, VectorAt):
            return self.numbers[State(source, positions, layer)]
        if source not in self._vectors:
            self._vectors[source] = self._given(load_vector(source))
        return self._vectors[source]

    def _given(self, value: torch.Tensor) -> int:
        number = self._take()
        self.given[number] = value
        return number

    def _take(self) -> int:
        self._next += 1
        return self._next - 1
