"""What a readout is asked for, in plain values."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchscope_nn.body.program import ReadoutProgram
from patchscope_nn.errors import InputError
from patchscope_nn.models import Model
from patchscope_nn.plan import Plan, State, from_cache
from patchscope_nn.spec import Readout
from patchscope_nn.sweep import Cell


def readout_of(
    plan: Plan, cells: Sequence[Cell], numbers: Mapping[State, int], target: Model, mask: Any
) -> ReadoutProgram:
    """What a target pass reads.

    Args:
        plan: The plan.
        cells: The cells of the pass.
        numbers: The numbers of the states that its step reads.
        target: M*.
        mask: (n_cells, n_tokens) the attention mask of the prompts.

    Returns:
        That part of the program.
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
    """The function that reads a readout inside a context.

    Raises:
        InputError: It cannot be imported.
    """
    module, _, name = readout.body.partition(":")
    try:
        body: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the body {readout.body!r} of the readout {readout.name} cannot be imported: {error}.",
            hint="Write module:function, and run where Python finds the module (PYTHONPATH).",
        ) from error
    return body


@dataclass(frozen=True)
class _PassCells:
    """The cells of a pass, as `spec.PassCells` describes them."""

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
