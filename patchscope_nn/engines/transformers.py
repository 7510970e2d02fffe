"""The engine of transformers models: their own PyTorch modules, traced by nnsight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nnsight
import torch

from patchscope_nn.body.contexts import Results, open_context
from patchscope_nn.body.program import Work
from patchscope_nn.models import in_turn
from patchscope_nn.plan import Context


@in_turn
def emit(context: Context, work: Work, *, source: Any, target: Any, backend: Any = None) -> Results:
    """Open a context and run a step in it.

    Args:
        context: Which one.
        work: What `unpack` made of the step.
        source: M, an nnsight model.
        target: M*, an nnsight model; the same object where there is one model.
        backend: An nnsight backend that takes the step elsewhere; None runs it in this process. One that
            does not wait gives nothing back here.

    Returns:
        `passes`: for each target pass a list of readouts, one for each row; `kept`: tensors by number;
        `prefix`: the keys and values of its prefix, where the step was asked for them.
    """
    # A body is shipped by the source of its functions; without this they would be looked up by name.
    nnsight.register("patchscope_nn")
    with torch.no_grad(), _untracked(source, target):
        return open_context(context, work, source, target, backend)


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
