"""The contexts that a step runs in. The only place that opens a trace.

fused    one trace; source and target are two invokes that meet at a barrier, and so one forward
session  one session: source traces, then target traces that use their values
nested   two models: the source's traces run inside the target's session
bridged  two models, not both in this process: the source's session gives its states back, and they
travel as values inside the target's (two sessions, which `backends` runs)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import nnsight

from patchscope_nn.body.batch import fused, in_source, in_target
from patchscope_nn.body.packed import in_packed, in_prefix
from patchscope_nn.body.program import Results, StepProgram
from patchscope_nn.body.states import in_sums

#: Called while a target pass runs in this process, with rows and the token that each has just decoded; first
#: with two empty lists, once the prompts have been read.
Hear = Callable[[list[int], list[int]], None]


def open_context(
    context: str, program: Any, source: Any, target: Any, *, backend: Any, hear: Sequence[Hear]
) -> Any:
    """Open a context and run a step in it; `engines.Engine.run` explains the arguments."""
    if context == "fused":
        return fused(target, program, backend, hear)
    if context == "session":
        return _session(target, program, backend, hear)
    return _nested(source, target, program, hear)


def _session(model: Any, program: Any, backend: Any, hear: Sequence[Hear]) -> Any:
    results: Any = None
    with model.session(backend=backend):
        results = nnsight.save(_in_series(model, program, hear))
    return results  # noqa: RET504 (a context's body binds a name; it cannot return)


def _in_series(model: Any, program: Any, hear: Sequence[Hear]) -> Any:
    """Run a step, or all steps of a series; each is independent of the others."""
    if "series" in program:
        return [_in_session(model, model, step, hear) for step in program["series"]]
    return _in_session(model, model, program, hear)


def _nested(source: Any, target: Any, program: Any, hear: Sequence[Hear]) -> Results:
    with target.session():
        results = nnsight.save(_in_session(source, target, program, hear))
    return results  # noqa: RET504 (the same)


def _in_session(source: Any, target: Any, program: StepProgram, hear: Sequence[Hear]) -> Results:
    """Run a step's source passes, then its target passes. Runs inside a context, as all `in_...` do."""
    states = dict(program["given"])
    for source_pass in program["sources"]:
        states.update(in_source(source, source_pass, program["source_site"]))
    states.update(in_sums(states, program["sums"]))
    site, writing, prefix = program["target_site"], program["writing"], None
    if program["prefix"] is not None:
        prefix = in_prefix(target, program["prefix"], site)
    passes = []
    for number, target_pass in enumerate(program["targets"]):
        heard = hear[number] if hear else None
        if target_pass["layout"] == "rows":
            rows = in_target(target, target_pass, states, site, writing, hear=heard)
        else:
            rows = in_packed(target, target_pass, states, site, writing, prefix=prefix, hear=heard)
        passes.append(rows)
    kept = {number: states[number].clone() for number in program["keep"]}
    returned = prefix if program["prefix"] is not None and program["prefix"]["kept"] else None
    return {"passes": passes, "kept": kept, "prefix": returned}
