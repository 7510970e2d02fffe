"""Opens the contexts that a step runs in. Only `body` opens traces.

fused    one trace: source and target are two invokes that meet at a barrier, in one forward pass
session  one session: source traces, then target traces that use their values
nested   two models: the source traces run inside the session of the target
bridged  two models that are not both in this process: two sessions, run by `backends`; the states of the
         first are sent to the second as values
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import nnsight

from patchscope_nn.body.batch import fused, in_source, in_target
from patchscope_nn.body.packed import in_packed, in_prefix
from patchscope_nn.body.program import Results, StepProgram
from patchscope_nn.body.requests import RequestProgram, in_request
from patchscope_nn.body.results import in_results
from patchscope_nn.body.states import in_rows, in_sums, in_together

#: Called while a target pass runs in this process: first with two empty lists, when the prompts have been
#: read; then after each decoding step, with the rows that continue and the token that each has just decoded.
Hear = Callable[[list[int], list[int]], None]


def open_context(
    context: str, program: Any, source: Any, target: Any, *, backend: Any, hear: Sequence[Hear]
) -> Any:
    """Open a context and run a step in it; see `engines.Engine.run` for the arguments."""
    if context == "fused":
        return fused(target, program, backend, hear)
    if context == "session":
        return _session(target, program, backend, hear)
    return _nested(source, target, program, hear)


def open_requests(model: Any, requests: Sequence[RequestProgram], *, backend: Any = None) -> list[Any]:
    """Run requests in one trace of an engine that batches requests by itself.

    Args:
        model: The engine's model.
        requests: The requests.
        backend: As in `open_context`; a trace that runs elsewhere has a single request.

    Returns:
        The answers, in order.
    """
    answers: Any = None
    with model.trace(backend=backend) as tracer:
        for request in requests:
            with tracer.invoke(prompt_of(request), **request["sampling"]):
                answers = nnsight.save(in_request(model, tracer, request))
    # nnsight returns the answers to several requests as a list, and the answer to a single one by itself.
    return answers if len(requests) > 1 else [answers]


def prompt_of(request: RequestProgram) -> dict[str, Any]:
    """Return the prompt of a request in vLLM's form.

    Its salt is its own, so that no other request ever uses keys and values that a patch has changed.
    """
    return {"prompt_token_ids": request["ids"], "cache_salt": uuid.uuid4().hex}


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
    given, given_finals = program["given"], program["given_finals"]
    hidden, finals = ([] if part is None else [part] for part in (given, given_finals))
    for source_pass in program["sources"]:
        read, read_finals = in_source(source, source_pass, program["source_site"])
        hidden.extend(read)
        finals.extend(read_finals)
    table = in_together(hidden)
    states = SimpleNamespace(
        hidden=None if table is None else in_sums(table, program["sums"]),
        finals=in_together(finals),
        soft=program["soft"],
    )
    site, writing, prefix = program["target_site"], program["writing"], None
    if program["prefix"] is not None:
        prefix = in_prefix(target, program["prefix"], site)
    pending = []
    for number, target_pass in enumerate(program["targets"]):
        hear_pass = hear[number] if hear else None
        if target_pass["layout"] == "rows":
            results = in_target(target, target_pass, states, site, writing, hear=hear_pass)
        else:
            results = in_packed(target, target_pass, states, site, writing, prefix=prefix, hear=hear_pass)
        pending.append((results, target_pass))
    return {
        "passes": [in_results(*of_pass, states.hidden) for of_pass in pending],
        "kept": in_rows(states.hidden, program["keep"]),
        "kept_finals": in_rows(states.finals, program["keep_finals"]),
        "prefix": prefix if program["prefix"] is not None and program["prefix"]["kept"] else None,
    }
