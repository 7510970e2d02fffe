"""The proof of a model: does what the compiler makes of a Patchscope equal the model under plain hooks?

1. The plain path, without any optimisation, is compared with plain hooks: reads and writes at the first, a
   middle and the last block, and at one block of every kind.
2. All optimisations together are compared with the same, for every readout and site. Where they differ, the
   plain path is compared too, and they are added to it one after the other: those that change a number are
   switched off.
3. Both again beyond every length at which the config says that the model computes otherwise.

Where all blocks are alike, this is done on a few of them, and the next tokens of the whole model are compared
besides. Whatever differs is found on the whole model.
"""

from __future__ import annotations

import time

import torch

from patchscope_nn.backends import is_out_of_memory
from patchscope_nn.errors import ModelError
from patchscope_nn.models import Model, Verdict
from patchscope_nn.proof.checks import Checks, probed_layers
from patchscope_nn.proof.prompts import thresholds
from patchscope_nn.proof.short import shortened

#: Thresholds up to so many tokens are passed by the ordinary prompts.
ORDINARY = 24
#: How many operations the trials beyond a length may take, by the kind of the device, and about how many
#: forwards they are.
_AFFORDABLE = {"cpu": 1.5e12, "cuda": 2e15}
_FORWARDS = 20
#: A small model has the operations, but attention grows with the square of its tokens.
_LONGEST = {"cpu": 2048, "cuda": 16384}


def prove(model: Model, *, key: str) -> Verdict:
    """Prove a model.

    Args:
        model: The model, with its weights in this process.
        key: What the verdict is kept under.

    Returns:
        What holds on it.

    Raises:
        ModelError: The plain path is not what plain hooks give, or its numbers are not finite.
    """
    started = time.monotonic()
    proof = _short_proof(model) or _proof(model)
    return Verdict(
        key=key,
        causal=proof.hooks.causal,
        limit=proof.limit,
        withheld=tuple(proof.withheld),
        comparisons=tuple(proof.comparisons),
        elapsed_s=round(time.monotonic() - started, 3),
    )


def _short_proof(model: Model) -> Checks | None:
    """The checks of a few blocks of a model, and of the next tokens of all of it; None where any differs."""
    short = shortened(model, probed_layers(model))
    if short is None:
        return None
    whole = Checks(model)
    try:
        proof = _proof(short)
        whole.hooks.batches = proof.hooks.batches
        whole.compare_next_tokens()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    proof.comparisons[:0] = whole.comparisons
    return None if whole.withheld or proof.withheld else proof


def _proof(model: Model) -> Checks:
    """All checks, on ordinary prompts and beyond every length that can be afforded."""
    lengths = thresholds(model)
    ordinary = [length for length in lengths if length <= ORDINARY]
    larger = [length for length in lengths if length > ORDINARY]
    try:
        proof = Checks(model)
        proof.limit = larger[0] if larger else None
        proof.begin(ordinary)
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{model.info.name} ({type(model.module).__name__}) does not run under plain hooks, with which "
            f"it is compared: {type(error).__name__}: {error}",
            hint="Please report the architecture; load(..., proof=False) skips the proof, at your own risk.",
        ) from error
    for place, length in enumerate(larger):
        if not _affordable(model, length):
            break
        proof.limit = larger[place + 1] if place + 1 < len(larger) else None
        if not proof.go_beyond(length):
            proof.limit = length
            break
    return proof


def _affordable(model: Model, tokens: int) -> bool:
    weights = model.info.n_layers * model.info.sizes.block_weights
    device = "cpu" if model.info.device == "cpu" else "cuda"
    if tokens > _LONGEST[device]:
        return False
    return 2 * weights * tokens * _FORWARDS <= _AFFORDABLE[device]
