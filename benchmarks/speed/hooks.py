"""(a) Plain transformers with forward hooks, cell by cell, as one writes it by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.speed.workloads import Answers, Cell, Said, Workload, text_of
from patchscope_nn.models import Model


def run(workload: Workload, source: Model, target: Model) -> Answers:
    """For each cell a forward of the source with a hook that reads, and one of the target that is patched."""
    with torch.no_grad():
        return {cell: _cell(workload, cell, source.module, target) for cell in workload.cells}


def _cell(workload: Workload, cell: Cell, source: Any, target: Model) -> Said:
    read: list[torch.Tensor] = []
    with _hook(_blocks(source)[cell.layer], lambda output: read.append(output[0, -1].clone())):
        source(torch.tensor([workload.sources[cell.row]], device=source.device))
    state = workload.mapped(read[0])
    patched = False

    def write(output: torch.Tensor) -> None:
        nonlocal patched
        if not patched:  # decoding goes through this block too
            output[0, workload.position] = state
            patched = True

    ids = torch.tensor([workload.target], device=target.module.device)
    with _hook(_blocks(target.module)[cell.target_layer], write):
        if workload.max_new_tokens:
            found = target.module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=workload.max_new_tokens,
                do_sample=False,
            )
            return Said(text_of(found[0, ids.shape[1] :].tolist(), workload, target.tokenizer))
        logits = target.module(ids).logits
    logprob, token = logits[0, -1].log_softmax(-1).max(-1)
    return Said(int(token), float(logprob))


def _blocks(module: Any) -> Any:
    return module.get_decoder().layers


@contextmanager
def _hook(block: Any, act: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Do something with a block's output, (batch, n_tokens, d_model)."""

    def after(_module: Any, _args: Any, output: Any) -> None:
        act(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
