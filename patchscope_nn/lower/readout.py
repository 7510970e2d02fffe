"""Lowers a readout to plain values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from patchscope_nn._util.functions import import_function
from patchscope_nn.body.program import ReadoutProgram
from patchscope_nn.errors import InputError
from patchscope_nn.lower.states import StateTable
from patchscope_nn.models import Model
from patchscope_nn.plan import Plan, from_cache
from patchscope_nn.spec import Readout
from patchscope_nn.sweep import CellBlock, Sweep


def readout_of(
    plan: Plan, block: CellBlock, table: StateTable, target: Model, mask: torch.Tensor
) -> ReadoutProgram:
    """Return the program of what a target pass reads.

    Args:
        plan: The plan.
        block: The cells of the pass.
        table: The states of its step.
        target: M*.
        mask: (n_cells, n_tokens) the attention mask of the prompts.
    """
    readout, used = plan.sweep.scope.readout, plan.optimisations
    cached = from_cache(plan.sweep, used)
    cells = _PassCells(plan.sweep, block, table, target)
    return {
        "read": body_of(readout),
        "asked": readout.lower(cells),
        "unembeds": readout.unembeds,
        "decodes": readout.decodes,
        "finite": list(readout.finite),
        "clean": readout.looks_at_replaced,
        "compared": cells.compared,
        "n_cells": len(block),
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

    sweep: Sweep
    block: CellBlock
    table: StateTable
    target: Model

    @property
    def seeds(self) -> list[int]:
        seeds: list[int] = self.block.seed.tolist()
        return seeds

    @property
    def prompts(self) -> list[list[int]]:
        return [list(self.sweep.target_prompts[prompt].ids) for prompt in self.block.target_prompt.tolist()]

    @property
    def reference_ids(self) -> torch.Tensor:
        return torch.from_numpy(self.sweep.reference_ids[self.block.entry])

    @property
    def continuations(self) -> list[list[list[int]]]:
        entries = (self.sweep.entries[entry] for entry in self.block.entry.tolist())
        return [[list(ids) for ids in entry.continuations] for entry in entries]

    @functools.cached_property
    def compared(self) -> torch.Tensor | None:
        if not self.block.cells.compares:
            return None
        return torch.from_numpy(self.table.finals(self.sweep.states.final(self.block.reference)))

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
