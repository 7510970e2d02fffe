"""The engine of transformers models: their own PyTorch modules, traced by nnsight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nnsight
import torch

from patchscope_nn.body.contexts import Hear, open_context
from patchscope_nn.body.program import Series, StepProgram
from patchscope_nn.models import in_turn
from patchscope_nn.plan import Context


@in_turn
def emit(
    context: Context,
    program: StepProgram | Series,
    *,
    source: Any,
    target: Any,
    backend: Any = None,
    hear: Sequence[Hear] = (),
) -> Any:
    """Open a context and run a step, or a series of steps, in it.

    Args:
        context: Which one.
        program: The step.
        source: M, an nnsight model.
        target: M*, an nnsight model; the same object where there is one model.
        backend: An nnsight backend that takes the step elsewhere; None runs it in this process. One that
            does not wait returns nothing here.
        hear: For each target pass a function that is called while it runs in this process; or none.

    Returns:
        The step's `Results`; for a series a list of them.
    """
    # A body is shipped by the source of its functions; without this they would be looked up by name.
    nnsight.register("patchscope_nn")
    with torch.no_grad(), _untracked(source, target):
        return open_context(context, program, source, target, backend=backend, hear=hear)


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
