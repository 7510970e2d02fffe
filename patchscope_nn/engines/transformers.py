"""The engine of transformers models: their own PyTorch modules, traced by nnsight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nnsight
import torch

from patchscope_nn.body.contexts import Hear, open_context
from patchscope_nn.body.program import Series, StepProgram
from patchscope_nn.models import Feature, Model, ModelInfo, in_turn
from patchscope_nn.plan import Context


class Transformers:
    """The engine of transformers models."""

    name = "transformers"

    def supports(self, info: ModelInfo, feature: Feature) -> bool:
        """As its architecture says, which was found by structure at load."""
        return info.supports(feature)

    def opens(self, context: Context) -> bool:
        """Whether it can run a step in a context; a bridged step runs as two sessions."""
        return context in ("fused", "session", "nested")

    @in_turn
    def run(
        self,
        context: Context,
        program: StepProgram | Series,
        *,
        source: Model,
        target: Model,
        backend: Any = None,
        hear: Sequence[Hear] = (),
    ) -> Any:
        """Run a step, or a series of steps, as `Engine.run` says."""
        # A body is shipped by the source of its functions; without this they would be looked up by name.
        nnsight.register("patchscope_nn")
        traced = source.traced, target.traced
        with torch.no_grad(), _untracked(*traced):
            return open_context(context, program, *traced, backend=backend, hear=hear)


@contextmanager
def _untracked(*models: Any) -> Iterator[None]:
    """Leave the models' training mode as it was; a Patchscope never runs with dropout."""
    training = [module for module in (model._module for model in models) if module.training]  # noqa: SLF001 (as in Model.module)
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()
