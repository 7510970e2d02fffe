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
        """Return what the model's architecture supports, as found from its structure when it was loaded."""
        return info.supports(feature)

    def opens(self, context: Context) -> bool:
        """Return whether it can run a step in a context. A bridged step runs as two sessions."""
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
        """Run a step, or a series of steps; see `Engine.run`."""
        # Functions are sent to servers by their source; without this, nnsight would send their names.
        nnsight.register("patchscope_nn")
        traced = source.traced, target.traced
        with torch.no_grad(), _untracked(*traced):
            return open_context(context, program, *traced, backend=backend, hear=hear)


@contextmanager
def _untracked(*models: Any) -> Iterator[None]:
    """Put the models into evaluation mode, since a Patchscope runs without dropout, and restore it after."""
    training = [module for module in (model._module for model in models) if module.training]  # noqa: SLF001 (as in Model.module)
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()
