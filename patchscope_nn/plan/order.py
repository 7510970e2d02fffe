"""Orders entries so that target prompts that begin with the same tokens run together, and run those once.

The cells of a group are planned together, and keep one prefix in memory. Small groups would make small
passes, so all entries of small groups go into one last group, whose prefix is what its prompts have in
common, if anything. A small group stays if its cells decode behind a long prefix: each of them would copy it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from patchscope_nn._util.ragged import Ints
from patchscope_nn.sweep import Sweep

#: A prefix of fewer tokens is not worth its own pass.
_SHORTEST = 2
#: Rows that decode hold copies of what they do not share. So many tokens are worth passes of their own.
_MANY_COPIED = 2**13


class Group(NamedTuple):
    """Entries that run together.

    Attributes:
        entries: The entries, in the order in which they run.
        prefix: The tokens that all their target prompts begin with, before the first patched or read token.
    """

    entries: tuple[int, ...]
    prefix: tuple[int, ...]


def group_entries(sweep: Sweep, entries: Collection[int], *, cells_of: Ints, enough: int) -> list[Group]:
    """Group entries by the tokens that their target prompts begin with.

    Args:
        sweep: The sweep.
        entries: The entries that will run, in order.
        cells_of: How many cells of each entry run.
        enough: The fewest cells of a group, unless many would decode behind a long prefix; not for the last.

    Returns:
        The groups. Each entry is in one of them; entries with the same target prompt are neighbours.
    """
    of_prompt: dict[int, list[int]] = {}
    for entry in entries:
        of_prompt.setdefault(sweep.entries[entry].target_prompt, []).append(entry)
    beginnings, decodes = _beginnings(sweep, entries), sweep.scope.readout.decodes
    groups, rest = [], []
    for prompts, prefix in _alike(beginnings):
        members = [entry for prompt in sorted(prompts) for entry in of_prompt[prompt]]
        n_cells = sum(int(cells_of[entry]) for entry in members)
        if n_cells >= enough or (decodes and n_cells * len(prefix) >= _MANY_COPIED):
            groups.append(Group(tuple(members), prefix))
        else:
            rest += prompts
    if rest:
        rest.sort()
        prefix = beginnings[rest[0]]
        for prompt in rest:
            prefix = _common(prefix, beginnings[prompt])
        prefix = prefix if len(prefix) >= _SHORTEST else ()
        groups.append(Group(tuple(entry for prompt in rest for entry in of_prompt[prompt]), prefix))
    return sorted(groups, key=lambda group: min(group.entries))


def _alike(beginnings: Mapping[int, tuple[int, ...]]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """Yield prompts that share at least half of their beginnings, with the tokens that they share."""
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
    """Return {target prompt: the tokens before the first one that its entries patch or read}."""
    ends: dict[int, int] = {}
    for number in entries:
        entry = sweep.entries[number]
        written = entry.target_positions or entry.source_positions
        end = min(int(sweep.read_at[entry.target_prompt]), *(min(positions) for positions in written))
        ends[entry.target_prompt] = min(end, ends.get(entry.target_prompt, end))
    return {prompt: sweep.target_prompts[prompt].ids[:end] for prompt, end in ends.items()}


def _common(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that two sequences begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    size = next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
    return tuple(first[:size])
