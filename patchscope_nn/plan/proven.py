"""Switches off the optimisations that the proof of a model does not allow. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from patchscope_nn.errors import InputError
from patchscope_nn.models import FUSED, PLAIN, ModelInfo, Withheld
from patchscope_nn.plan.passes import Optimisations
from patchscope_nn.spec import Readout
from patchscope_nn.sweep import Sweep

#: Optimisations that change how prompts are arranged in a pass. The others only avoid repeated work.
_ARRANGED = ("mixed_lengths", "prefix_sharing", "late_entry", "shared_attention", "cached_decoding", FUSED)
#: Optimisations that change how source prompts run.
_OF_SOURCES = ("source_sharing", "mixed_lengths")
_PACKING = ("prefix_sharing", "late_entry")


def allowed(sweep: Sweep, optimisations: Optimisations) -> tuple[Optimisations, tuple[Withheld, ...]]:
    """Switch off the optimisations that the proofs of a sweep's models do not allow for its prompts.

    Args:
        sweep: The sweep.
        optimisations: The optimisations that are requested.

    Returns:
        The optimisations that may be used, and those that were requested and are withheld.

    Raises:
        InputError: A prompt is longer than what is right for a model, or `every_step` needs to decode from
            keys and values, which gives wrong results for the target model.
    """
    entries = tuple(dict.fromkeys(_withheld(sweep)))
    for entry in entries:
        if entry.optimisation == PLAIN:
            raise InputError(
                f"a prompt, with the tokens that are appended, has more than {entry.beyond} tokens. "
                f"{entry.why}",
                hint=f"Use prompts of up to {entry.beyond} tokens.",
            )
    off = {entry.optimisation for entry in entries}
    if sweep.scope.target.every_step and "cached_decoding" in off:
        why = next(entry.why for entry in entries if entry.optimisation == "cached_decoding")
        raise InputError(
            f"target.every_step decodes from keys and values, which gives wrong results for "
            f"{sweep.target.name}: {why}.",
            hint="Leave every_step out, or use another model.",
        )
    switched_off = {name: False for name in Optimisations.names() if name in off}
    withheld = tuple(
        entry
        for entry in entries
        if entry.optimisation == FUSED or getattr(optimisations, entry.optimisation, False)
    )
    return replace(optimisations, **switched_off), withheld


def _withheld(sweep: Sweep) -> Iterator[Withheld]:
    """Yield what the verdicts of both models withhold, for the lengths of this sweep's prompts."""
    source = max((len(prompt.ids) for prompt in sweep.source_prompts), default=0)
    of_source = _of(sweep.source, None, source)
    yield from (entry for entry in of_source if entry.optimisation in (*_OF_SOURCES, PLAIN))
    target = _longest_target(sweep)
    yield from _of(sweep.target, sweep.scope.readout, target)
    verdict = sweep.target.verdict
    most = None if verdict is None else verdict.longest_packed
    if most is not None and 2 * target > most:
        # The packed pass of one cell may hold its prompt twice: unpatched and patched.
        why = f"a packed pass of a cell could have more than {most} tokens"
        yield from (Withheld(name, None, most // 2, why) for name in _PACKING)


def _of(info: ModelInfo, readout: Readout | None, tokens: int) -> Iterator[Withheld]:
    """Yield what a model's verdict withholds for a readout and a number of tokens.

    If the proof does not try this kind of readout and it decodes, or if `readout` is None, everything that
    is wrong with any readout is withheld.
    """
    verdict = info.verdict
    if verdict is None:
        return
    known = readout is not None and (readout.proven or not readout.decodes)
    names = {readout.name} if known and readout else {entry.readout for entry in verdict.withheld}
    for name in names:
        yield from verdict.off(readout=name or "", tokens=tokens)
    if verdict.limit is not None and tokens > verdict.limit:
        why = f"the proof tried no more than {verdict.limit} tokens"
        yield from (Withheld(name, None, verdict.limit, why) for name in _ARRANGED)


def _longest_target(sweep: Sweep) -> int:
    """Return the length of the longest target prompt, with the tokens that its readout appends."""
    more = sweep.scope.readout.decoded
    return max(
        (
            len(sweep.target_prompts[entry.target_prompt].ids)
            + max([more, *(len(ids) for ids in entry.continuations)])
            for entry in sweep.entries
        ),
        default=0,
    )
