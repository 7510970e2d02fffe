"""The contract of an engine: how a step runs on one kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from patchscope_nn.body.contexts import Hear
from patchscope_nn.body.program import Series, StepProgram
from patchscope_nn.models import Feature, Model, ModelInfo
from patchscope_nn.plan import Context


class Engine(Protocol):
    """Runs steps on models of one kind.

    A model names its engine (`ModelInfo.engine`). Code outside `engines` never asks which engine it is: the
    planner asks `ModelInfo.supports`, and backends ask `opens`. An engine is correct if its results equal
    those of plain PyTorch hooks on the same weights; `tests/engine_check.py` checks that.
    """

    @property
    def name(self) -> str:
        """The name that models and options use for it."""

    def supports(self, info: ModelInfo, feature: Feature) -> bool:
        """Return whether a model on this engine supports a feature."""

    def opens(self, context: Context) -> bool:
        """Return whether it can run a step in a context."""

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
        """Run a step, or a series of steps, in a context.

        Args:
            context: A context that it opens.
            program: The step. It is not changed.
            source: M.
            target: M*; the same object as `source` if there is one model.
            backend: An nnsight backend that runs the step elsewhere; None runs it in this process.
            hear: For each target pass, a function that is called while it runs in this process; may be empty.

        Returns:
            The step's `Results`; for a series, a list of them; None if the backend does not wait for them.
        """
