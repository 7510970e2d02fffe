"""The proof of a remote model: a single job runs it, and only readouts are returned.

Plain hooks cannot be set on a remote model. So the optimisations are compared with the plain path, which runs
an nnsight trace for each cell, in the same job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from patchscope_nn.body.program import Series, StepProgram
from patchscope_nn.errors import JobError, ModelError
from patchscope_nn.models import Comparison, Model, Verdict, Withheld
from patchscope_nn.plan import Optimisations
from patchscope_nn.proof.checks import OF_DECODING, SHORT, probed_layers
from patchscope_nn.proof.distances import readout_distance
from patchscope_nn.proof.prompts import thresholds
from patchscope_nn.proof.prove import ORDINARY
from patchscope_nn.proof.trials import CHOICES, GENERATE, HIDDEN, NEXT_TOKEN, Lengths, Runner, Trial

#: The tolerance. The dtype of a remote model is not known, so half precision is assumed.
_ROUNDING = 0.15
#: The length of the longest prompt that is sent, in tokens.
_LONGEST = 4096
#: Runs a step remotely and returns its results; for a series, the list of its steps' results.
Run = Callable[[StepProgram | Series], Any]
#: A trial, and the optimisations with which it runs.
_Request: TypeAlias = tuple[Trial, Optimisations]


def prove_remotely(model: Model, run: Run, *, key: str) -> Verdict:
    """Prove a remote model, of which only the config and the structure are local.

    Raises:
        ModelError: Even the plain path fails on the server.
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
    results = _run(runner, [(trial, used) for trial, _ in trials for used in (plain, full)], run)
    comparisons: list[Comparison] = []
    withheld: list[Withheld] = []
    for number, (trial, length) in enumerate(trials):
        expected, optimised = results[2 * number : 2 * number + 2]
        if isinstance(expected, str):
            raise ModelError(
                f"{model.info.name} cannot be traced on the server: even without any optimisation, "
                f"{trial.name} fails: {expected}",
                hint="Use another model; `patchscope doctor --remote` lists those that run.",
            )
        error, problem = _difference(expected, optimised)
        if problem and withheld:  # perhaps caused by an optimisation that is off already
            runner.verdict = Verdict(key="", withheld=tuple(withheld))
            error, problem = _difference(expected, _run(runner, [(trial, full)], run)[0])
        off = _guilty(runner, trial, length, expected, run) if problem else []
        withheld += off
        outcome = ", ".join(map(str, off)) if problem else "equal"
        what, blocks = f"all optimisations: {trial.name}", model.info.n_layers
        comparisons.append(Comparison(what, blocks, trial.tokens, error, _ROUNDING, outcome))
    return Verdict(
        key=key,
        causal=model.info.architecture.causal,
        limit=limit,
        withheld=tuple(dict.fromkeys(withheld)),
        comparisons=tuple(comparisons),
        elapsed_s=round(time.monotonic() - started, 3),
    )


def _trials(model: Model, ordinary: Sequence[int], beyond: int) -> list[Trial]:
    """Return the trials with ordinary prompts, or if `beyond` is not 0, with prompts beyond this length."""
    layers = probed_layers(model)
    middle = layers[len(layers) // 2]
    longest = max(max([SHORT.source, *ordinary]) + 4, beyond + 6 if beyond else 0)
    rows = (SHORT, Lengths(longest, longest - 1))
    across = (Lengths(SHORT.source, beyond), rows[1]) if beyond else rows
    three = (*rows, SHORT._replace(variant=1))
    return [
        Trial(readout=NEXT_TOKEN, rows=three, layers=(middle,) if beyond else layers),
        *([] if beyond else [Trial(readout=HIDDEN, rows=rows, layers=layers[:2])]),
        Trial(readout=GENERATE, rows=across, layers=(middle,)),
        Trial(readout=CHOICES, rows=across, layers=(middle,)),
    ]


def _guilty(
    runner: Runner, trial: Trial, beyond: int, expected: Sequence[dict[str, Any]], run: Run
) -> list[Withheld]:
    """Add the optimisations one by one to the plain path, with a job each; withhold those that change it."""
    used = Optimisations.none()
    withheld = []
    for name in Optimisations.names():
        tried = replace(used, **{name: True})
        _, problem = _difference(expected, _run(runner, [(trial, tried)], run)[0])
        if not problem:
            used = tried
            continue
        readout = trial.readout.name if trial.readout.decodes and name in OF_DECODING else None
        withheld.append(Withheld(name, readout, beyond, f"{trial.name} {problem}"))
    return withheld


def _run(runner: Runner, requests: Sequence[_Request], run: Run) -> list[list[dict[str, Any]] | str]:
    """Run trials in a single job; if it fails, each trial in a separate job.

    Returns:
        The readouts of each trial, cell by cell; for a trial whose job fails, the server's message.
    """
    trials = [runner.programs(trial, used) for trial, used in requests]
    try:
        results = iter(run({"series": [program for trial in trials for program in trial.programs]}))
        return [trial.rows(results) for trial in trials]
    except JobError as error:
        if len(requests) == 1:
            return [error.message]
        return [_run(runner, [request], run)[0] for request in requests]


def _difference(expected: Any, observed: Any) -> tuple[float, str]:
    """Return the largest difference of two lists of readouts, and what is wrong; empty if they are equal."""
    if isinstance(observed, str):
        return float("inf"), f"fails ({observed.strip().splitlines()[0][:120]})"
    error = max(readout_distance(*readouts) for readouts in zip(expected, observed, strict=True))
    return error, "" if error <= _ROUNDING else f"differs by {error:.2g}"
