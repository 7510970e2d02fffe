"""Shards: parts of a run that can run in different places at the same time."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from patchscope_nn._util.ragged import Ints
from patchscope_nn.errors import InputError

_FORM = re.compile(r"(\d+)/(\d+)")


class Shard(NamedTuple):
    """One of `total` parts of a run; `number` counts from 1."""

    number: int
    total: int

    @classmethod
    def of(cls, value: Any) -> Shard | None:
        """Parse `"3/16"` or `(3, 16)`; None stays None.

        Raises:
            InputError: It is not a shard.
        """
        if value is None:
            return None
        form = _FORM.fullmatch(value.strip()) if isinstance(value, str) else None
        numbers = tuple(map(int, form.groups())) if form else value
        if isinstance(numbers, tuple) and len(numbers) == 2 and 1 <= numbers[0] <= numbers[1]:  # noqa: PLR2004 (k of n)
            return cls(*numbers)
        shown = value if isinstance(value, str) else "/".join(map(str, value))
        raise InputError(
            f"shard={shown} is not a shard.", hint="Give k/n with k from 1 to n, for example 3/16."
        )

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @property
    def suffix(self) -> str:
        """What the name of a shard's folder ends with."""
        return f"-shard-{self.number}-of-{self.total}"

    def cells(self, starts: Ints) -> range:
        """Return the numbers of the shard's cells.

        A shard has consecutive entries (data rows with their target prompts) and at least one. Shards have as
        equal numbers of cells as that allows.

        Args:
            starts: (n_entries + 1) the number of each entry's first cell.

        Raises:
            InputError: There are fewer entries than shards.
        """
        n_entries = len(starts) - 1
        if n_entries < self.total:
            raise InputError(
                f"shard={self} divides {n_entries} data rows and target prompts into {self.total} shards.",
                hint=f"Use at most {n_entries} shards, since each takes one or more of them.",
            )
        shards = np.arange(self.total + 1)
        ends = np.searchsorted(starts, starts[-1] * shards / self.total)
        # Each shard ends after the one before, and leaves an entry for each one that follows.
        ends = np.maximum.accumulate(ends - shards) + shards
        ends = np.minimum(ends, n_entries - self.total + shards)
        first, last = starts[ends[[self.number - 1, self.number]]].tolist()
        return range(first, last)
