"""The engine of vLLM models: each prompt is a request, traced by nnsight in the processes of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import nnsight

from patchscope_nn.body.contexts import Hear, open_requests
from patchscope_nn.body.program import Results, Series, StepProgram
from patchscope_nn.errors import RunError
from patchscope_nn.lower.requests import exchange
from patchscope_nn.models import VLLM, Feature, Model, ModelInfo, in_turn, preemptions
from patchscope_nn.plan import Context


class Vllm:
    """The engine of vLLM models."""

    name = VLLM

    def supports(self, info: ModelInfo, feature: Feature) -> bool:
        """Return what the engine supports; it is the same for all its models."""
        return info.supports(feature)

    def opens(self, context: Context) -> bool:
        """Return whether it can run a step in a context."""
        return context == "session"

    @in_turn
    def run(
        self,
        context: Context,  # noqa: ARG002 (there is only one)
        program: StepProgram | Series,
        *,
        source: Model,  # noqa: ARG002 (a session has one model)
        target: Model,
        backend: Any = None,  # noqa: ARG002 (a served model is not run here)
        hear: Sequence[Hear] = (),
    ) -> Any:
        """Run a step, or a series of steps; see `Engine.run`. What is heard comes after all requests."""
        # Functions are sent to the engine's processes by their source.
        nnsight.register("patchscope_nn")
        steps: Any = program.get("series")
        if steps is not None:
            return [_run(step, target) for step in steps]
        results = _run(cast("StepProgram", program), target)
        for hear_pass, columns in zip(hear, results["passes"], strict=False):
            hear_pass([], [])
            for token in columns.get("token_ids", [[]])[0]:
                hear_pass([0], [token])
        return results


def _run(program: StepProgram, model: Model) -> Results:
    """Run a step.

    Raises:
        RunError: Its keys and values did not fit into the engine's memory.
    """
    steps, before = exchange(program), preemptions(model)
    try:
        requests = next(steps)
        while True:
            requests = steps.send(open_requests(model.traced, requests))
    except StopIteration as ended:
        if preemptions(model) != before:
            raise RunError(
                "vLLM was out of memory for keys and values; it computed prompts again, without patches.",
                hint="Fewer cells at a time: --max-rows.",
            ) from None
        results: Results = ended.value
        return results
