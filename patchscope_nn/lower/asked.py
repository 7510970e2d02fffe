"""What a readout is asked for, in plain values."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from patchscope_nn.models import Model
from patchscope_nn.plan import Plan, State, from_cache
from patchscope_nn.spec import Choices, Generate, Hidden, NextToken
from patchscope_nn.sweep import Cell


def readout_of(
    plan: Plan, cells: Sequence[Cell], numbers: Mapping[State, int], target: Model
) -> dict[str, Any]:
    """What a pass's readout is asked for."""
    readout, entries = plan.sweep.scope.readout, plan.sweep.entries
    arguments = target.info.architecture.arguments
    work: dict[str, Any] = {
        "name": readout.name,
        "clean": isinstance(readout, Hidden) and readout.clean,
        "numbered": "position_ids" in arguments,
        "extra": {"logits_to_keep": 1} if "logits_to_keep" in arguments else {},
    }
    if isinstance(readout, NextToken):
        before = [
            numbers[State(cell.reference[0], (cell.reference[1],), None)]
            for cell in cells
            if cell.reference is not None
        ]
        work |= {
            "top_k": readout.top_k,
            "references": [list(entries[cell.entry].reference_ids) for cell in cells],
            "before": before,
            "from_source": readout.reference == "source",
        }
    elif isinstance(readout, Generate):
        work |= {
            "max_new_tokens": readout.max_new_tokens,
            "eos": list(eos_ids(target)),
            "stops": list(stop_ids(target.tokenizer, readout.stop) if readout.stop else ()),
            "temperature": readout.temperature,
            "seeds": [cell.seed for cell in cells],
            "leaving": plan.optimisations.early_leaving
            and from_cache(plan.sweep, plan.optimisations)
            and not plan.sweep.scope.target.every_step,
            "mixed": plan.optimisations.mixed_lengths,
            "stepwise": not target.info.architecture.causal,
            "prompts": [list(plan.sweep.target_prompts[cell.target_prompt].ids) for cell in cells]
            if readout.relevancy
            else None,
        }
    elif isinstance(readout, Choices):
        continuations = [[list(ids) for ids in entries[cell.entry].continuations] for cell in cells]
        work |= {
            "continuations": continuations,
            "rereads": not from_cache(plan.sweep, plan.optimisations),
            "stepwise": not target.info.architecture.causal,
        }
    return work


def eos_ids(model: Model) -> tuple[int, ...]:
    """The ids that end a text: those of the generation config, and the tokenizer's."""
    config = getattr(model.module, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    return tuple(dict.fromkeys(one for one in [*ids, model.tokenizer.eos_token_id] if one is not None))


@functools.lru_cache(maxsize=32)
def stop_ids(tokenizer: Any, stop: str) -> tuple[int, ...]:
    """The tokens whose text holds a stop string.

    A row that decodes one can stop; a stop string spread over tokens ends no row early, and is cut from the
    text afterwards all the same.
    """
    ids = [[token] for token in range(len(tokenizer))]
    fast = getattr(tokenizer, "backend_tokenizer", None)  # ten times as fast as through transformers
    pieces = (
        fast.decode_batch(ids, skip_special_tokens=False)
        if fast is not None and not tokenizer.clean_up_tokenization_spaces
        else tokenizer.batch_decode(ids)
    )
    return tuple(token for token, piece in enumerate(pieces) if stop in piece)
