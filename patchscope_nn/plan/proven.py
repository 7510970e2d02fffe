"""What the proof of the models leaves of the optimisations that a plan may use. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from patchscope_nn.errors import InputError
from patchscope_nn.models import FUSED, PLAIN, ModelInfo, Withheld
from patchscope_nn.plan.passes import Optimisations
from patchscope_nn.spec import Readout
from patchscope_nn.sweep import Sweep

#: What depends on how prompts stand in a pass; the others only decide what is run again.
_ARRANGED = ("mixed_lengths", "prefix_sharing", "late_entry", "shared_attention", "cached_decoding", FUSED)
#: What decides how source prompts run.
_OF_SOURCES = ("source_sharing", "mixed_lengths")
_PACKING = ("prefix_sharing", "late_entry")


def allowed(sweep: Sweep, optimisations: Optimisations) -> tuple[Optimisations, tuple[Withheld, ...]]:
    """Switch off what the proofs of a sweep's models do not allow for its prompts.

    Args:
        sweep: The sweep.
        optimisations: What is wanted.

    Returns:
        What may be used, and what was taken from it.

    Raises:
        InputError: `every_step` needs to decode from keys and values, which is wrong for the target model.
    """
    entries = tuple(dict.fromkeys(_withheld(sweep)))
    for entry in entries:
        if entry.optimisation == PLAIN:
            raise InputError(
                f"a prompt, with what is appended, has more than {entry.beyond} tokens. {entry.why}",
                hint=f"Use prompts of up to {entry.beyond} tokens.",
            )
    off = {entry.optimisation for entry in entries}
    if sweep.scope.target.every_step and "cached_decoding" in off:
        why = next(entry.why for entry in entries if entry.optimisation == "cached_decoding")
        raise InputError(
            f"target.every_step decodes from keys and values, which is wrong for {sweep.target.name}: {why}.",
            hint="Leave every_step out, or use another model.",
        )
    used = {name: False for name in Optimisations.names() if name in off}
    wanted = tuple(
        entry
        for entry in entries
        if entry.optimisation == FUSED or getattr(optimisations, entry.optimisation, False)
    )
    return replace(optimisations, **used), wanted


def _withheld(sweep: Sweep) -> Iterator[Withheld]:
    source = max((len(prompt.ids) for prompt in sweep.source_prompts), default=0)
    of_source = _of(sweep.source, None, source)
    yield from (entry for entry in of_source if entry.optimisation in (*_OF_SOURCES, PLAIN))
    target = _longest_target(sweep)
    yield from _of(sweep.target, sweep.scope.readout, target)
    verdict = sweep.target.verdict
    most = None if verdict is None else verdict.longest_packed
    if most is not None and 2 * target > most:
        # One cell's packed pass may hold its prompt twice: as the clean prompt, and with the patch.
        why = f"a packed pass of a cell could have more than {most} tokens"
        yield from (Withheld(name, None, most // 2, why) for name in _PACKING)


def _of(info: ModelInfo, readout: Readout | None, tokens: int) -> Iterator[Withheld]:
    """What a model's verdict withholds; `readout` None is for what any readout withholds.

    For a kind that decodes and that the proof does not try, what is wrong with any other is withheld.
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
    """The longest target prompt, with the tokens that its readout appends."""
    more = sweep.scope.readout.decoded
    return max(
        (
            len(sweep.target_prompts[entry.target_prompt].ids)
            + max([more, *(len(ids) for ids in entry.continuations)])
            for entry in sweep.entries
        ),
        default=0,
    )
