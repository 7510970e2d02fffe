"""How fits report what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

#: Called with (done, total): steps, texts or subjects.
Progress: TypeAlias = Callable[[int, int], None]
#: Called with a sentence if a fit may be unreliable.
Notice: TypeAlias = Callable[[str], None]
Item = TypeVar("Item")


def counted(items: Sequence[Item], progress: Progress | None) -> Iterator[Item]:
    """Yield the items, and report after each how many are done."""
    for done, item in enumerate(items, start=1):
        yield item
        if progress is not None:
            progress(done, len(items))
