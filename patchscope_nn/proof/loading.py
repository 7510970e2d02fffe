"""Loading models and proving them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from patchscope_nn import models
from patchscope_nn.backends import Local, Server
from patchscope_nn.errors import ServerError
from patchscope_nn.models import ELSEWHERE, Model, Verdict, cost_of, is_offloaded
from patchscope_nn.proof import store
from patchscope_nn.proof.prove import prove
from patchscope_nn.proof.remote import prove_remotely
from patchscope_nn.proof.requests import prove_requests

_LOG = logging.getLogger(__name__)


def load(model: Any, *, proof: bool = True, **options: Any) -> Model:
    """Load a decoder, or wrap one that is already loaded, and prove it.

    Args:
        model: A Hugging Face id or a folder, of a model or of a LoRA adapter;
            `builtin:smollm2-135m-instruct`; an `nnsight.TransformersModel`; a transformers model, also
            compiled or with adapters of peft; or a `Model` (returned unchanged).
        proof: True compares the compiler with plain PyTorch hooks on this model if its structure is new.
            False uses every optimisation without proof, and manifests record that.
        **options: `revision` (of the Hub); `dtype` (a torch dtype or its name; `auto`, the default, keeps the
            checkpoint's); `device_map`; `tokenizer` (needed only for a transformers model whose tokenizer
            cannot be found); `weights` (False loads only the config and the tokenizer, enough for a remote
            model); and options of transformers' `from_pretrained`, such as `quantization_config`.

    Returns:
        The model with its tokenizer and its description.

    Raises:
        ModelError: The model cannot be found, is not a decoder, its parts cannot be found, or it cannot be
            traced correctly.
    """
    if isinstance(model, Model):
        return model
    loaded = models.load(model, **options)
    return proven(loaded) if proof else loaded


def proven(model: Model) -> Model:
    """Add a model's verdict: the stored verdict of its structure, or if there is none, the result of a proof.

    A remote model is returned unchanged; it is proven by `proven_on`.

    Raises:
        ModelError: It cannot be traced correctly.
    """
    if model.info.device == ELSEWHERE or model.info.verdict is not None:
        return model
    return _kept_or_made(model, store.structure_key(model), functools.partial(_prove_here, model))


def _prove_here(model: Model, key: str) -> Verdict:
    if model.info.supports("requests"):
        return prove_requests(model, Local(), key=key)
    if is_offloaded(model.module):
        _LOG.warning(
            "%s is proven once, now: about 40 forwards of a few tokens, each of which moves all of its "
            "weights. load(..., proof=False) skips the proof.",
            model.info.name,
        )
    return prove(model, key=key)


def proven_on(model: Model, backend: Server) -> Model:
    """Add a remote model's verdict: the stored one, or if there is none, the result of a proof in a job.

    Raises:
        ModelError: It cannot be traced on the server.
        ServerError: The server cannot be reached.
    """
    if model.info.device != ELSEWHERE or model.info.verdict is not None:
        return model

    key = store.structure_key(model, host=backend.host)
    if model.info.supports("requests"):
        return _kept_or_made(model, key, lambda key: prove_requests(model, backend, key=key))

    def run(program: Any) -> Any:
        try:
            return backend.run("session", program, source=model, target=model)
        except ServerError:  # the result can no longer be fetched, or the server was restarted
            return backend.run("session", program, source=model, target=model)

    return _kept_or_made(model, key, lambda key: prove_remotely(model, run, key=key))


def _kept_or_made(model: Model, key: str, make: Callable[[str], Verdict]) -> Model:
    """Add the stored verdict of a key to a model; if there is none, make and store it."""
    verdict = store.known(key)
    if verdict is None:
        verdict = make(key)
        store.keep(verdict)
    if line := _line(model.info.name, verdict):
        _LOG.warning("%s", line)
    architecture = replace(model.info.architecture, causal=verdict.causal, terms=verdict.terms)
    return replace(model, info=replace(model.info, architecture=architecture, verdict=verdict))


def _line(name: str, verdict: Verdict) -> str:
    """Describe in one line what is off and what that costs; empty if nothing is off."""
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
