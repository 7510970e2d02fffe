"""Loading a model with its proof."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from patchscope_nn import models
from patchscope_nn.backends import Ndif
from patchscope_nn.errors import ServerError
from patchscope_nn.models import ELSEWHERE, Model, Verdict, cost_of, is_offloaded
from patchscope_nn.proof import store
from patchscope_nn.proof.prove import prove
from patchscope_nn.proof.remote import prove_remotely

_LOG = logging.getLogger(__name__)


def load(model: Any, *, proof: bool = True, **options: Any) -> Model:
    """Load a decoder, or wrap one that is already loaded, and prove it.

    Args:
        model: A Hugging Face id, a folder, `builtin:smollm2-135m-instruct`, an
            `nnsight.TransformersModel`, a transformers model, or a `Model` (returned as it is).
        proof: Whether the compiler is compared with plain PyTorch hooks on this model, the first time its
            structure is met. False uses every optimisation unproven, and manifests say so.
        **options: `revision`, `dtype`, `device_map`, `tokenizer`, `weights`, and what transformers'
            `from_pretrained` takes, as in `models.load`.

    Returns:
        The model, its tokenizer, and what is known of it.

    Raises:
        ModelError: The model cannot be found, is no decoder, hides its parts, or cannot be traced rightly.
    """
    if isinstance(model, Model):
        return model
    loaded = models.load(model, **options)
    return proven(loaded) if proof else loaded


def proven(model: Model) -> Model:
    """A model with its verdict: the one that is kept for its structure, or else one that is made now.

    A model whose weights are elsewhere is returned as it is; its first job carries the proof.

    Raises:
        ModelError: It cannot be traced rightly.
    """
    if model.info.device == ELSEWHERE or model.info.verdict is not None:
        return model
    return _kept_or_made(model, store.structure_key(model), functools.partial(_prove_here, model))


def _prove_here(model: Model, key: str) -> Verdict:
    if is_offloaded(model.module):
        _LOG.warning(
            "%s is proven now, and only this once: some 40 forwards of a few tokens, each of which moves all "
            "of its weights. load(..., proof=False) skips it.",
            model.info.name,
        )
    return prove(model, key=key)


def proven_on(model: Model, backend: Ndif) -> Model:
    """A model with its verdict, whose weights are on a server: a job carries the proof, unless it is known.

    Raises:
        ModelError: It cannot be traced there.
        ServerError: The server cannot be reached.
    """
    if model.info.device != ELSEWHERE or model.info.verdict is not None:
        return model

    def run(program: Any) -> Any:
        try:
            return backend.run("session", program, source=model, target=model)
        except ServerError:  # a result that can no longer be fetched, or a server that was restarted
            return backend.run("session", program, source=model, target=model)

    return _kept_or_made(
        model, store.structure_key(model, host=backend.host), lambda key: prove_remotely(model, run, key=key)
    )


def _kept_or_made(model: Model, key: str, make: Callable[[str], Verdict]) -> Model:
    """A model with the verdict that is kept under a key, or that is made and kept now."""
    verdict = store.known(key)
    if verdict is None:
        verdict = make(key)
        store.keep(verdict)
    if line := _line(model.info.name, verdict):
        _LOG.warning("%s", line)
    return with_verdict(model, verdict)


def with_verdict(model: Model, verdict: Verdict) -> Model:
    """A model that the planner knows a verdict of."""
    architecture = replace(model.info.architecture, causal=verdict.causal)
    return replace(model, info=replace(model.info, architecture=architecture, verdict=verdict))


def _line(name: str, verdict: Verdict) -> str:
    """What is off and what that costs, in one line; empty where nothing is."""
    off: dict[str, list[str]] = {}
    for entry in verdict.withheld:
        where = off.setdefault(f"{entry.name}{entry.longer}", [])
        where += [entry.readout] if entry.readout else []
    if not off:
        return ""
    parts = [f"{what} ({', '.join(where)})" if where else what for what, where in off.items()]
    names = dict.fromkeys(entry.optimisation for entry in verdict.withheld)
    costs = "; ".join(cost_of(name) for name in names)
    return (
        f"{name}: off because they would change a number: {', '.join(parts)}. "
        f"The cost: {costs}. See: patchscope doctor --model {name}"
    )
