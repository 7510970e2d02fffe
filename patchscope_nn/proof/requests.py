"""The proof of a model on an engine of requests (vLLM), where plain PyTorch hooks cannot be set.

1. A block may return its states as several tensors that the next block adds. How many is found by trying:
   two prompts differ only in their last token. If the state of that token, at any layer, is written into the
   other prompt, the rest of the model computes the same from it, and the next token has the same distribution
   as after the first prompt. A read or write of only a part of the state fails this.
2. A state that is written onto itself changes nothing, at every site. What the engine decodes and scores by
   itself, without any trace of its modules, equals what is read.
3. If the weights fit twice into this machine's memory, reads, writes, texts and choices are compared with
   plain hooks on the transformers model.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from patchscope_nn import models
from patchscope_nn.backends import Backend
from patchscope_nn.errors import ModelError, PatchscopeError
from patchscope_nn.models import ELSEWHERE, Comparison, Model, Verdict, Withheld
from patchscope_nn.plan import Optimisations
from patchscope_nn.proof.checks import ROUNDING, SHORT, paired_sites, probed_layers
from patchscope_nn.proof.distances import readout_distance
from patchscope_nn.proof.hooks import Hooks
from patchscope_nn.proof.prompts import as_text
from patchscope_nn.proof.reference import Reference
from patchscope_nn.proof.trials import CHOICES, GENERATE, HIDDEN, NEXT_TOKEN, Lengths, Runner, Trial
from patchscope_nn.spec import RESIDUAL, SITES, Patchscope, Site, Source, Target
from patchscope_nn.sweep import Cell

#: How many tensors may add up to the residual stream.
_TERMS = (1, 2, 3)
#: The largest difference of log-probabilities that rounding explains, by dtype, in nats.
_NATS = {"float32": 1e-2}
_NATS_HALF = 0.3
#: A model is loaded a second time if its weights take at most this share of the free memory.
_TWICE = 0.3

_Raw = list[tuple[Cell, dict[str, Any]]]


def prove_requests(model: Model, backend: Backend, *, key: str) -> Verdict:
    """Prove a model on an engine of requests; `key` is the key of its verdict in the store.

    Raises:
        ModelError: It cannot be traced correctly.
    """
    started = time.monotonic()
    proof = _Proof(model, backend)
    proof.find_terms()
    proof.check_own_output()
    sites = [site for site in SITES.values() if model.info.lacks(site) is None and not site.in_stream]
    for site in sites:
        proof.check_site(site)
    if (twin := _twin(model)) is not None:
        proof.compare(twin)
    return Verdict(
        key=key,
        terms=proof.terms,
        withheld=tuple(proof.withheld),
        comparisons=tuple(proof.comparisons),
        elapsed_s=round(time.monotonic() - started, 3),
    )


class _Proof:
    """The comparisons so far, and what is switched off."""

    def __init__(self, model: Model, backend: Backend) -> None:
        self.model, self.backend, self.terms = model, backend, 1
        self.named = f"{model.info.name} on {model.info.engine}"
        self.layers = probed_layers(model)
        self.tolerance = _NATS.get(model.info.dtype, _NATS_HALF)
        self.withheld: list[Withheld] = []
        self.comparisons: list[Comparison] = []

    def find_terms(self) -> None:
        """Find how many tensors add up to the residual stream.

        Raises:
            ModelError: No number of tensors does.
        """
        errors = {}
        for terms in _TERMS:
            self.terms = terms
            try:
                errors[terms] = self._transplanted(self._runner())
            except PatchscopeError as error:
                raise ModelError(
                    f"{self.model.info.name} cannot be traced on {self.model.info.engine}: {error.message}",
                    hint=error.hint,
                ) from error
            if errors[terms] <= self.tolerance:
                self._note("a state in another prompt", errors[terms], "equal")
                return
        tried = ", ".join(f"{terms}: {error:.2g}" for terms, error in errors.items())
        raise ModelError(
            f"the blocks of {self.named} do not return the residual stream "
            f"as a sum of up to {max(_TERMS)} tensors: a state that is written into another prompt does not "
            f"determine its next token (differences in nats by number of tensors: {tried}).",
            hint="Use the engine transformers, and please report the architecture.",
        )

    def _runner(self) -> Runner:
        architecture = replace(self.model.info.architecture, terms=self.terms)
        info = replace(self.model.info, architecture=architecture)
        return Runner(replace(self.model, info=info), self.backend)

    def _transplanted(self, runner: Runner) -> float:
        """Return the largest difference between a prompt and one that got the state of its last token."""
        layers = ("embed", *self.layers)
        first, second = _pair(runner)
        cells = _run(runner, [(first, second), (second, first)], layers=layers)
        clean = {cell.row: raw for cell, raw in cells if cell.control == "unpatched"}
        patched = [(cell.row, raw) for cell, raw in cells if cell.control is None]
        if readout_distance(clean[0], clean[1]) <= self.tolerance:
            raise ModelError(
                "the two prompts of the proof have the same next token.", hint="Report the model."
            )
        return max(readout_distance(clean[1 - row], raw) for row, raw in patched)

    def check_own_output(self) -> None:
        """Compare what is read without a patch with what the engine computes without any trace.

        Raises:
            ModelError: They differ.
        """
        runner = self._runner()
        first, _ = _pair(runner)
        cells = _run(runner, [(first, first)], layers=self.layers[:1], readout=GENERATE)
        next_cells = _run(runner, [(first, first)], layers=self.layers[:1])
        read = next(raw for cell, raw in next_cells if cell.control == "unpatched")
        error = 0.0
        for _, raw in cells:
            # Of two lists of top tokens, the first halves are compared.
            own = {"top_ids": raw["token_ids"][:1] * 2, "top_probs": raw["unpatched_token_probs"][:1] * 2}
            error = max(error, _apart_in_text(raw), readout_distance(read, own))
        self._note("the engine's own output", error, "equal" if error <= self.tolerance else "refused")
        if error > self.tolerance:
            raise ModelError(
                f"{self.named} decodes other tokens than those that are read "
                f"(a difference of {error:.2g} nats).",
                hint="Use the engine transformers, and please report the model.",
            )

    def check_site(self, site: Site) -> None:
        """Check that a state written onto itself at a site changes nothing; else withhold the site."""
        runner = self._runner()
        first, second = _pair(runner)
        cells = _run(runner, [(first, first), (second, first)], layers=self.layers, site=site)
        clean = next(raw for cell, raw in cells if cell.control == "unpatched")
        errors = {
            row: max(
                readout_distance(clean, raw) for cell, raw in cells if cell.row == row and not cell.control
            )
            for row in (0, 1)
        }
        why = "" if errors[0] <= self.tolerance else f"a state written onto itself differs by {errors[0]:.2g}"
        if not why and errors[1] == 0:
            why = "a write has no effect"
        self._note(f"site {site.name}", errors[0], f"{site.name} is off" if why else "equal")
        if why:
            self.withheld.append(Withheld(site.name, None, 0, why))

    def compare(self, twin: Model) -> None:
        """Compare with plain hooks on the transformers model.

        Raises:
            ModelError: They differ.
        """
        runner, hooks = self._runner(), Hooks(twin)
        reference = Reference(runner, hooks)
        tolerance = ROUNDING.get(self.model.info.dtype, max(ROUNDING.values()))
        middle = self.layers[len(self.layers) // 2]
        longer = Lengths(SHORT.source + 4, SHORT.target + 6)
        trials = [
            Trial(readout=NEXT_TOKEN, rows=(SHORT, longer), layers=self.layers),
            Trial(readout=HIDDEN, rows=(SHORT,), layers=self.layers),
            Trial(readout=GENERATE, rows=(SHORT, longer), layers=(middle,)),
            Trial(readout=CHOICES, rows=(SHORT, longer), layers=(middle,)),
        ]
        trials += [
            Trial(readout=NEXT_TOKEN, rows=(SHORT,), layers=(middle,), sites=sites)
            for sites in paired_sites(self.model.info)
            if all(twin.info.lacks(site) is None for site in sites)
        ]
        for trial in trials:
            reference.prepare(trial)
            cells = runner.run(trial, Optimisations())
            error = max(reference.error(trial, cell, raw) for cell, raw in cells)
            what = f"plain hooks in transformers: {trial.name}"
            if error <= tolerance:
                self._note(what, error, "equal", tolerance)
                continue
            read, written = trial.sites
            if read == written == RESIDUAL:
                raise ModelError(
                    f"{self.named} differs from transformers: {trial.name} by "
                    f"{error:.2g} standard deviations.",
                    hint="Use the engine transformers, and please report the model.",
                )
            sites = [site for site in trial.sites if site != RESIDUAL]
            self._note(what, error, ", ".join(f"{site.name} is off" for site in sites), tolerance)
            self.withheld += [
                Withheld(site.name, None, 0, f"{trial.name} differs by {error:.2g}") for site in sites
            ]

    def _note(self, what: str, error: float, outcome: str, tolerance: float | None = None) -> None:
        tolerance = self.tolerance if tolerance is None else tolerance
        self.comparisons.append(
            Comparison(what, self.model.info.n_layers, SHORT.source, error, tolerance, outcome)
        )


def _pair(runner: Runner) -> tuple[list[int], list[int]]:
    """Return two prompts that differ only in their last token."""
    ids = runner.source_prompt(SHORT)
    other = next(token for token in runner.ids["t"] if token != ids[-1])
    return ids, [*ids[:-1], other]


def _run(
    runner: Runner,
    prompts: list[tuple[list[int], list[int]]],
    *,
    layers: Any,
    readout: Any = NEXT_TOKEN,
    site: Site = RESIDUAL,
) -> _Raw:
    """Write the state of the last token of a prompt into that of another; return each cell's raw readout."""
    source = Source(prompt="{s}", position=-1, layer=layers, site=site.name)
    target = Target(prompt="{t}", position=-1, layer="same", site=site.name)
    scope = Patchscope(source=source, target=target, readout=readout)
    rows = [{name: as_text(ids) for name, ids in zip("st", pair, strict=True)} for pair in prompts]
    return runner.run_scope(scope, rows, controls=("unpatched",))


def _apart_in_text(raw: dict[str, Any]) -> float:
    """Return the largest difference of a decoded text's probabilities to those that the engine scores."""
    scored = {"token_ids": raw["token_ids"], "token_probs": raw["unpatched_token_probs"]}
    return readout_distance(scored, raw)


def _twin(model: Model) -> Model | None:
    """Load the model with transformers; None if its weights are elsewhere, or do not fit twice."""
    import psutil

    info = model.info
    n_weights = info.n_layers * info.sizes.block_weights + 2 * info.sizes.unembed_weights
    if info.device == ELSEWHERE or n_weights * 4 > _TWICE * psutil.virtual_memory().available:
        return None
    return models.load(info.name, revision=info.revision, dtype=info.dtype, device_map="cpu")
