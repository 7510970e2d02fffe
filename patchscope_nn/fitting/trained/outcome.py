"""What a fit gives: maps, numbers on what was held out, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

#: Called with (steps done, steps in all).
Progress: TypeAlias = Callable[[int, int], None]
#: (l, l*) -> the tensors of its map, by name.
Maps: TypeAlias = Mapping[tuple[int, int], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """A fit.

    Attributes:
        kind: What was fitted, for example `tuned_lens`.
        maps: For each (l, l*), `weight` (d_out, d_in) or `scale` (1,), and it may have `bias` (d_out,).
        held_out: One entry for each (l, l*): numbers on data that was not fitted on.
        provenance: The settings and the counts of the data, as JSON holds them.
    """

    kind: str
    maps: Maps = field(repr=False)
    held_out: tuple[Any, ...]
    provenance: dict[str, Any]
