"""The proof of a model: tests that compiled Patchscopes equal the model under plain hooks.

1. The plain path, without optimisations, is compared with plain hooks: reads and writes at the first, a
   middle and the last block, and at a block of every kind.
2. All optimisations together are compared with plain hooks, for every readout and site. If they differ, the
   plain path is compared too, and the optimisations are added to it one by one: those that change a number
   are switched off.
3. Both are repeated beyond every length at which, by its config, the model computes differently.

If all blocks are alike, a few of them are tested, and in addition the next tokens of the whole model. If
anything differs, all checks are repeated on the whole model.
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

#: The ordinary prompts are long enough for thresholds up to this many tokens.
ORDINARY = 24
#: The maximum number of operations of the trials beyond a length, by device, and their approximate number of
#: forwards.
_AFFORDABLE = {"cpu": 1.5e12, "cuda": 2e15}
_FORWARDS = 20
#: The maximum length in tokens; attention grows with its square, also in a small model.
_LONGEST = {"cpu": 2048, "cuda": 16384}


def prove(model: Model, *, key: str) -> Verdict:
    """Prove a model with its weights in this process; `key` is the key of its verdict in the store.

    Raises:
        ModelError: The plain path differs from plain hooks, or its numbers are not finite.
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
    """Check a few blocks of a model, and the next tokens of the whole model; None if anything differs."""
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
    """Run all checks, on ordinary prompts and beyond every length that is affordable."""
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
            f"{model.info.name} ({type(model.module).__name__}) does not run under plain hooks, so it cannot "
            f"be compared with them: {type(error).__name__}: {error}",
            hint="Please report the architecture; load(..., proof=False) skips the proof, at your own risk.",
        ) from error
    for length, following in zip(larger, [*larger[1:], None], strict=False):
        if not _affordable(model, length):
            break
        proof.limit = following
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
