"""The contexts that a step runs in. The only place that opens a trace.

fused    one trace; source and target are two invokes that meet at a barrier, and so one forward
session  one session: source traces, then target traces that use their values
nested   two models: the source's traces run inside the target's session
bridged  two models, not both in this process: the source's session gives its states back, and they
travel as values inside the target's (two sessions, which `backends` runs)
"""

from __future__ import annotations

from typing import Any

import nnsight

from patchscope_nn.body.batch import fused, in_source, in_target
from patchscope_nn.body.packed import in_packed, in_prefix
from patchscope_nn.body.program import Work
from patchscope_nn.body.states import in_sums

#: What a context gives back: the readouts of each target pass, row by row, and the states that go out.
Results = dict[str, Any]


def open_context(context: str, work: Work, source: Any, target: Any, backend: Any) -> Results:
    """Open a context and run a step in it; `engines.transformers.emit` has the arguments."""
    if context == "fused":
        return fused(target, work, backend)
    if context == "session":
        return _session(target, work, backend)
    return _nested(source, target, work)


def _session(model: Any, work: Work, backend: Any) -> Results:
    results: Any = None
    with model.session(backend=backend):
        results = nnsight.save(_in_series(model, work))
    return results  # noqa: RET504 (a context's body binds a name; it cannot return)


def _in_series(model: Any, work: Work) -> Any:
    """Run a step, or all steps of a series; each is independent of the others."""
    if "series" in work:
        return [_in_session(model, model, step) for step in work["series"]]
    return _in_session(model, model, work)


def _nested(source: Any, target: Any, work: Work) -> Results:
    with target.session():
        results = nnsight.save(_in_session(source, target, work))
    return results  # noqa: RET504 (the same)


def _in_session(source: Any, target: Any, work: Work) -> Results:
    """Run a step's source passes, then its target passes. Runs inside a context, as all `in_...` do."""
    states = dict(work["carried"])
    for one in work["sources"]:
        states.update(in_source(source, one, work["source_paths"]))
    states.update(in_sums(states, work["sums"]))
    prefix = in_prefix(target, work["prefix"], work["target_paths"]) if work["prefix"] else None
    passes = [
        in_target(target, one, states, work["target_paths"], work["how"])
        if one["layout"] is None
        else in_packed(target, one, states, work["target_paths"], work["how"], prefix=prefix)
        for one in work["targets"]
    ]
    kept = {number: states[number].clone() for number in work["keep"]}
    return {"passes": passes, "kept": kept, "prefix": prefix if prefix and work["prefix"]["kept"] else None}
