"""The proof of a model whose weights are elsewhere: one job carries it, and only readouts come back.

Plain hooks cannot be set there. The optimisations are compared with the plain path, one nnsight trace for
each cell, in the same job.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from patchscope_nn.body.program import Series, StepProgram
from patchscope_nn.errors import JobError, ModelError
from patchscope_nn.models import Comparison, Model, Verdict, Withheld
from patchscope_nn.plan import Optimisations
from patchscope_nn.proof.checks import OF_DECODING, SHORT, probed_layers
from patchscope_nn.proof.prompts import thresholds
from patchscope_nn.proof.prove import ORDINARY
from patchscope_nn.proof.trials import Lengths, Runner, Trial, readout_of
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken

#: The dtype there is not known here, so half precision is assumed.
_ROUNDING = 0.15
#: Longer prompts than this are not sent, in tokens.
_LONGEST = 4096
#: Runs a step there and returns its results; of a series a list of them.
Run = Callable[[StepProgram | Series], Any]


class _Asked(NamedTuple):
    """A trial, and the optimisations it is run with."""

    trial: Trial
    used: Optimisations


def prove_remotely(model: Model, run: Run, *, key: str) -> Verdict:
    """Prove a model whose weights are elsewhere.

    Args:
        model: The model; only its config and structure are here.
        run: Runs a step or a series of steps there.
        key: What the verdict is kept under.

    Returns:
        What holds on it.

    Raises:
        ModelError: Even the plain path fails there.
        ServerError: The server cannot be reached.
    """
    started = time.monotonic()
    lengths = thresholds(model)
    beyond = [length for length in lengths if ORDINARY < length <= _LONGEST]
    limit = next((length for length in lengths if length > _LONGEST), None)
    trials = [(trial, 0) for trial in _trials(model, [n for n in lengths if n <= ORDINARY], 0)]
    trials += [(trial, length) for length in beyond for trial in _trials(model, [], length)]
    runner = Runner(model)
    plain, full = Optimisations.none(), Optimisations()
    asked = [_Asked(trial, used) for trial, _ in trials for used in (plain, full)]
    results = _run(runner, asked, run)
    comparisons: list[Comparison] = []
    withheld: list[Withheld] = []
    for place, (trial, length) in enumerate(trials):
        expected, got = results[2 * place : 2 * place + 2]
        if isinstance(expected, str):
            raise ModelError(
                f"{model.info.name} cannot be traced there: even without any optimisation, {trial.name} "
                f"fails: {expected}",
                hint="Use another model; `patchscope doctor --remote` lists those that run.",
            )
        error, problem = _difference(expected, got)
        outcome = "equal"
        if problem and withheld:  # perhaps for what is off already
            runner.verdict = Verdict(key="", withheld=tuple(withheld))
            error, problem = _difference(expected, _run(runner, [_Asked(trial, full)], run)[0])
        if problem:
            off = _guilty(runner, trial, length, expected, run)
            withheld += off
            outcome = ", ".join(map(str, off))
        comparisons.append(
            Comparison(
                f"all optimisations: {trial.name}",
                model.info.n_layers,
                trial.tokens,
                error,
                _ROUNDING,
                outcome,
            )
        )
    return Verdict(
        key=key,
        causal=model.info.architecture.causal,
        limit=limit,
        withheld=tuple(dict.fromkeys(withheld)),
        comparisons=tuple(comparisons),
        elapsed_s=round(time.monotonic() - started, 3),
    )


def _trials(model: Model, ordinary: Sequence[int], beyond: int) -> list[Trial]:
    """The trials of ordinary prompts, or those beyond a length."""
    layers = probed_layers(model)
    middle = layers[len(layers) // 2]
    longest = max([SHORT.source + 4, *(length + 4 for length in ordinary), beyond + 6 if beyond else 0])
    rows = (SHORT, Lengths(longest, longest - 1))
    across = (Lengths(SHORT.source, beyond), rows[1]) if beyond else rows
    three = (*rows, SHORT._replace(other=True))
    return [
        Trial(readout=readout_of(NextToken), rows=three, layers=(middle,) if beyond else layers),
        *([] if beyond else [Trial(readout=readout_of(Hidden), rows=rows, layers=layers[:2])]),
        Trial(readout=readout_of(Generate), rows=across, layers=(middle,)),
        Trial(readout=readout_of(Choices), rows=across, layers=(middle,)),
    ]


def _guilty(
    runner: Runner, trial: Trial, beyond: int, expected: Sequence[dict[str, Any]], run: Run
) -> list[Withheld]:
    """Add one optimisation after the other to the plain path, a job each; those that change it are off."""
    used = Optimisations.none()
    withheld = []
    for name in Optimisations.names():
        tried = replace(used, **{name: True})
        _, problem = _difference(expected, _run(runner, [_Asked(trial, tried)], run)[0])
        if not problem:
            used = tried
            continue
        readout = trial.readout.name if trial.readout.decodes and name in OF_DECODING else None
        withheld.append(Withheld(name, readout, beyond, f"{trial.name} {problem}"))
    return withheld


def _run(runner: Runner, asked: Sequence[_Asked], run: Run) -> list[list[dict[str, Any]] | str]:
    """The readouts of some trials, cell by cell, in one job; of one that fails, in a job of its own, why."""
    programs = [runner.programs(entry.trial, entry.used) for entry in asked]
    try:
        series = [step for made in programs for step in made.steps]
        parts = iter(run({"series": series}))
        return [made.rows([next(parts) for _ in made.steps]) for made in programs]
    except JobError as error:
        if len(asked) == 1:
            return [error.message]
        return [_run(runner, [entry], run)[0] for entry in asked]


def _difference(expected: Any, got: Any) -> tuple[float, str]:
    """The largest difference of some cells, in standard deviations, and what is wrong; nothing if equal."""
    if isinstance(got, str):
        return float("inf"), f"fails ({got.strip().splitlines()[0][:120]})"
    error = max(_distance(one, other) for one, other in zip(expected, got, strict=True))
    return error, "" if error <= _ROUNDING else f"differs by {error:.2g}"


def _distance(expected: dict[str, Any], got: dict[str, Any]) -> float:
    """How far two readouts of a cell are apart, in nats; states in standard deviations."""
    if "top_ids" in expected:
        # The last of the top tokens may be others, where they are nearly as likely.
        half = len(got["top_ids"]) // 2
        known = dict(zip(expected["top_ids"], expected["top_probs"], strict=True))
        probs = [known.get(token, 0.0) for token in got["top_ids"][:half]]
        return _apart(probs, got["top_probs"][:half], logs=True)
    if "token_ids" in expected:
        pairs = zip(expected["token_ids"], got["token_ids"], strict=False)
        same = next((n for n, (one, other) in enumerate(pairs) if one != other), len(expected["token_ids"]))
        # Where two tokens are nearly as likely, either may be decoded, and the texts part there.
        return _apart(expected["token_probs"][: same + 1], got["token_probs"][: same + 1], logs=True)
    if "choice_logprobs" in expected:
        return _apart(expected["choice_logprobs"], got["choice_logprobs"], logs=False)
    scale = float(torch.tensor(expected["hidden"]).std())
    return _apart(expected["hidden"], got["hidden"], logs=False) / scale


def _apart(one: Any, other: Any, *, logs: bool) -> float:
    """The largest difference of two lists of numbers, or of their logarithms; infinite where it is none."""
    first, second = (torch.tensor(values, dtype=torch.float64).flatten() for values in (one, other))
    if first.shape != second.shape:
        return float("inf")
    first, second = (first.log(), second.log()) if logs else (first, second)
    difference = (first - second).masked_fill(first == second, 0).abs()  # a token may be ruled out in both
    largest = float(difference.amax()) if len(difference) else 0.0
    return largest if math.isfinite(largest) else math.inf
