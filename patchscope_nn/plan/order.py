"""In which order entries run: those together whose target prompts begin alike, so that this is run once.

A group's cells are planned together, and hold one prefix in memory. Small groups would make small passes,
so entries that few others are like go into one last group, with what its prompts have in common, if anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from patchscope_nn.spec import read_position
from patchscope_nn.sweep import Sweep

#: Fewer tokens than this are not worth a pass of their own.
_SHORTEST = 2


class Group(NamedTuple):
    """Entries that run together.

    Attributes:
        entries: The entries, in the order in which they run.
        prefix: The tokens that all their target prompts begin with, before any is patched or read.
    """

    entries: tuple[int, ...]
    prefix: tuple[int, ...]


def group_entries(
    sweep: Sweep, entries: Collection[int], *, cells_of: Mapping[int, int], enough: int
) -> list[Group]:
    """Group entries by how their target prompts begin.

    Args:
        sweep: The sweep.
        entries: The entries that are to run, in order.
        cells_of: For each of them how many cells it has.
        enough: How many cells make a group worth while.

    Returns:
        The groups, each entry in one of them; those of one target prompt are neighbours.
    """
    of_prompt: dict[int, list[int]] = {}
    for entry in entries:
        of_prompt.setdefault(sweep.entries[entry].target_prompt, []).append(entry)
    beginnings = _beginnings(sweep, entries)
    found, rest = [], []
    for prompts, prefix in _alike(beginnings):
        together = [entry for prompt in sorted(prompts) for entry in of_prompt[prompt]]
        if sum(cells_of[entry] for entry in together) >= enough:
            found.append(Group(tuple(together), prefix))
        else:
            rest += prompts
    if rest:
        rest.sort()
        prefix = beginnings[rest[0]]
        for prompt in rest:
            prefix = _common(prefix, beginnings[prompt])
        prefix = prefix if len(prefix) >= _SHORTEST else ()
        found.append(Group(tuple(entry for prompt in rest for entry in of_prompt[prompt]), prefix))
    return sorted(found, key=lambda group: min(group.entries))


def _alike(beginnings: Mapping[int, tuple[int, ...]]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """Prompts that share at least half of their beginnings, and what they share."""
    prompts: list[int] = []
    prefix: tuple[int, ...] = ()
    for prompt in sorted(beginnings, key=lambda prompt: (beginnings[prompt], prompt)):
        beginning = beginnings[prompt]
        shared = _common(prefix, beginning) if prompts else beginning
        if prompts and (len(shared) < _SHORTEST or 2 * len(shared) < max(len(prefix), len(beginning))):
            yield prompts, prefix
            prompts, shared = [], beginning
        prompts.append(prompt)
        prefix = shared if len(shared) >= _SHORTEST else ()
    if prompts:
        yield prompts, prefix


def _beginnings(sweep: Sweep, entries: Collection[int]) -> dict[int, tuple[int, ...]]:
    """For each target prompt the tokens that come before everything its entries patch or read."""
    ends: dict[int, int] = {}
    for entry in entries:
        one = sweep.entries[entry]
        whole = len(sweep.target_prompts[one.target_prompt].ids)
        written = one.target_positions or one.source_positions
        end = min(read_position(sweep.scope.readout, whole), *(min(together) for together in written))
        ends[one.target_prompt] = min(end, ends.get(one.target_prompt, end))
    return {prompt: sweep.target_prompts[prompt].ids[:end] for prompt, end in ends.items()}


def _common(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    size = next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return tuple(one[:size])
