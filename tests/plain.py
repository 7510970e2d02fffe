"""The reference for models whose insides nobody wrote down: plain forward hooks on a copy of a transformers model.

It finds the blocks by itself. Every token that is generated or scored costs a whole new forward in which the prompt
is read again with the patch: no cache, no padding. Cells are rows of a batch only if a row alone gives the same.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch


def blocks_of(module, n_layers):
    """The list of as many parts as there are layers that holds the most weights."""
    lists = [
        part
        for part in module.modules()
        if isinstance(part, torch.nn.ModuleList) and len(part) == n_layers
    ]
    return max(lists, key=lambda part: sum(weight.numel() for weight in part.parameters()), default=None)


class Plain:
    """A transformers model, read and written by forward hooks."""

    def __init__(self, module, *, n_layers):
        self.module = copy.deepcopy(module)
        self.blocks = blocks_of(self.module, n_layers)
        self.batches = None  # whether a row of a batch is what it is alone; found out at the first batch

    def states(self, ids):
        """(n_layers, d_model): what each block gives of the last token."""
        found = [None] * len(self.blocks)

        def read(layer, states):
            found[layer] = states[0, -1].clone()
            return states

        self._forward(torch.tensor([ids]), read)
        return torch.stack(found)

    def logits(self, rows, *, place, layers, states):
        """(n_rows, n_tokens, vocab): runs of equal length, each with its state written at a place after a layer."""
        if self.batches is None and len(rows) > 1:
            alone, some = self._one_by_one(rows[-1:], place, layers[-1:], states[-1:]), True
            together = self._together(rows, place, layers, states)
            some = torch.allclose(alone[0], together[-1], atol=1e-4, rtol=1e-4)
            self.batches = bool(some)
        run = self._together if self.batches else self._one_by_one
        return run(rows, place, layers, states)

    def _one_by_one(self, rows, place, layers, states):
        runs = zip(rows, layers, states, strict=True)
        return torch.cat([self._together([row], place, [layer], state[None]) for row, layer, state in runs])

    def _together(self, rows, place, layers, states):
        layers = torch.tensor(layers)

        def write(layer, found):
            (those,) = torch.where(layers == layer)
            if len(those):
                found = found.clone()
                found[those, place] = states[those]
            return found

        return self._forward(torch.tensor(rows), write)

    def _forward(self, ids, change):
        """The logits of a forward in which every block's output passes through `change`."""

        def hook_of(layer):
            def hook(_module, _args, output):
                first = output[0] if isinstance(output, tuple) else output
                changed = change(layer, first.reshape(*ids.shape, first.shape[-1])).reshape(first.shape)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return hook

        handles = [block.register_forward_hook(hook_of(layer)) for layer, block in enumerate(self.blocks)]
        try:
            with torch.no_grad(), fresh(self.module):
                return self.module(input_ids=ids, use_cache=False).logits.float()
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def fresh(module):
    """Put back afterwards what a forward leaves behind in the attributes and buffers of a model's parts."""
    parts = list(module.modules())
    kept = [dict(part.__dict__) for part in parts]
    buffers = [dict(part._buffers) for part in parts]
    values = [{name: value.clone() for name, value in found.items() if value is not None} for found in buffers]
    try:
        yield
    finally:
        for part, attributes, names, numbers in zip(parts, kept, buffers, values, strict=True):
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._buffers.clear()
            part._buffers.update(names)
            for name, value in numbers.items():
                part._buffers[name].copy_(value)
