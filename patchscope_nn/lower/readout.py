"""Lowers a readout to plain values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchscope_nn._util.functions import import_function
from patchscope_nn.body.program import ReadoutProgram
from patchscope_nn.errors import InputError
from patchscope_nn.models import Model
from patchscope_nn.plan import Plan, State, from_cache
from patchscope_nn.spec import Readout
from patchscope_nn.sweep import Cell


def readout_of(
    plan: Plan, cells: Sequence[Cell], numbers: Mapping[State, int], target: Model, mask: Any
) -> ReadoutProgram:
    """Return the program of what a target pass reads.

    Args:
        plan: The plan.
        cells: The cells of the pass.
        numbers: The state numbers of its step.
        target: M*.
        mask: (n_cells, n_tokens) the attention mask of the prompts.
    """
    readout, used = plan.sweep.scope.readout, plan.optimisations
    cached = from_cache(plan.sweep, used)
    return {
        "read": body_of(readout),
        "asked": readout.lower(_PassCells(plan, cells, numbers, target)),
        "unembeds": readout.unembeds,
        "decodes": readout.decodes,
        "finite": list(readout.finite),
        "clean": readout.looks_at_replaced,
        "n_cells": len(cells),
        "numbered": target.info.supports("positions"),
        "extra": {"logits_to_keep": 1} if target.info.supports("few_logits") else {},
        "eos": list(eos_ids(target)),
        "leaving": used.early_leaving and cached and not plan.sweep.scope.target.every_step,
        "mixed": used.mixed_lengths,
        "rereads": not cached,
        "stepwise": not target.info.supports("causal"),
        "mask": mask if readout.decodes else None,
    }


def body_of(readout: Readout) -> Callable[..., Any]:
    """Import the function that reads a readout inside a context.

    Raises:
        InputError: The function cannot be imported.
    """
    try:
        body: Callable[..., Any] = import_function(readout.body)
    except ValueError as error:
        raise InputError(
            f"the body {readout.body!r} of the readout {readout.name} cannot be imported: "
            f"{error.__cause__ or error}.",
            hint="Write module:function, and make sure that Python finds the module (PYTHONPATH).",
        ) from error
    return body


@dataclass(frozen=True)
class _PassCells:
    """The cells of a pass. Implements `spec.PassCells`."""

    plan: Plan
    cells: Sequence[Cell]
    numbers: Mapping[State, int]
    target: Model

    @property
    def seeds(self) -> list[int]:
        return [cell.seed for cell in self.cells]

    @property
    def prompts(self) -> list[list[int]]:
        return [list(self.plan.sweep.target_prompts[cell.target_prompt].ids) for cell in self.cells]

    @property
    def reference_ids(self) -> list[list[int]]:
        return [list(self.plan.sweep.entries[cell.entry].reference_ids) for cell in self.cells]

    @property
    def continuations(self) -> list[list[list[int]]]:
        entries = self.plan.sweep.entries
        return [[list(ids) for ids in entries[cell.entry].continuations] for cell in self.cells]

    @property
    def compared(self) -> list[int]:
        references = (cell.reference for cell in self.cells if cell.reference is not None)
        return [self.numbers[State(prompt, (position,), None)] for prompt, position in references]

    def token_ids_with(self, text: str) -> list[int]:
        return list(stop_ids(self.target.tokenizer, text))


def eos_ids(model: Model) -> tuple[int, ...]:
    """Return the ids that end a text: those of the generation config, and the tokenizer's."""
    config = getattr(model.module, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(id_ for id_ in [*ids, model.tokenizer.eos_token_id] if id_ is not None))


@functools.lru_cache(maxsize=32)
def stop_ids(tokenizer: Any, stop: str) -> tuple[int, ...]:
    """Return the tokens whose text contains a stop string.

    A row that decodes such a token stops. A stop string that is spread over several tokens does not stop its
    row early, but it is also cut from the text afterwards.
    """
    ids = [[token] for token in range(len(tokenizer))]
    fast = getattr(tokenizer, "backend_tokenizer", None)  # ten times faster than through transformers
    pieces = (
        fast.decode_batch(ids, skip_special_tokens=False)
        if fast is not None and not tokenizer.clean_up_tokenization_spaces
        else tokenizer.batch_decode(ids)
    )
    return tuple(token for token, piece in enumerate(pieces) if stop in piece)
