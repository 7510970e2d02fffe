"""The reference for models whose insides nobody wrote down: plain forward hooks on a copy of the model.

It finds the blocks by itself. Every token that is generated or scored costs a whole new forward, in which
the prompt is read again with the patch: no cache, no padding. Cells run as rows of a batch only if a row
alone gives the same.

Some models let the tokens of a prompt see each other in both directions, and decode causally. Reading a
generated token as part of the prompt would change the prompt's states. For these `follows` uses the model's
own `generate`, with the patch in its first forward.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch


class Plain:
    """A transformers model, read and written by forward hooks.

    `rereads` is False for a model that reads a prompt otherwise than what it decodes.
    """

    def __init__(self, module, *, n_layers, rereads=True):
        self.module, self.rereads = copy.deepcopy(module), rereads
        self.blocks = self._find(n_layers)
        self.batches = None  # whether a row of a batch is what it is alone; found out at the first batch

    def _find(self, n_layers):
        """Of the lists of as many parts as there are layers, the one with most weights that reads text."""
        lists = [part for part in self.module.modules() if isinstance(part, torch.nn.ModuleList)]
        lists = [part for part in lists if len(part) == n_layers]
        ran = set()
        handles = [
            part.register_forward_hook(lambda part, *_: ran.add(part)) for parts in lists for part in parts
        ]
        self._forward(torch.tensor([[5, 6, 7]]))
        for handle in handles:
            handle.remove()
        size = lambda parts: sum(weight.numel() for weight in parts.parameters())  # noqa: E731
        return max((parts for parts in lists if set(parts) <= ran), key=size, default=None)

    def looks_ahead(self, ids):
        """Whether what is said of a token changes with a later one."""
        first, second = (self._forward(torch.tensor([[*ids, last]]))[0, : len(ids)] for last in (5, 6))
        return not torch.allclose(first, second, atol=1e-4, rtol=1e-4)

    def states(self, ids):
        """(n_layers, width): what each block gives of the last token."""
        found = [None] * len(self.blocks)

        def read(layer, states):
            found[layer] = states[0, -1].clone()
            return states

        with self._changing(1, len(ids), read):
            self._forward(torch.tensor([ids]))
        return torch.stack(found)

    def follows(self, prompt, tokens, *, place, layers, states):
        """The logits of what follows a prompt, in runs that each write a state after a layer.

        Args:
            prompt: The ids of the prompt.
            tokens: For each run the ids behind the prompt that are read too, as many in each.
            place: The position of the patch, counted from the prompt's end.
            layers: For each run the layer whose output is patched.
            states: (n_runs, width) what is written.

        Returns:
            (n_runs, 1 + n_tokens, vocab), after the prompt's last token and after each of the tokens.
        """
        run = self._reread if self.rereads else self._decoded
        if self.batches is None and len(layers) > 1:
            alone = run(prompt, tokens[-1:], place, layers[-1:], states[-1:])
            together = run(prompt, tokens, place, layers, states)
            self.batches = torch.allclose(alone[0], together[-1], atol=1e-4, rtol=1e-4)
        if self.batches:
            return run(prompt, tokens, place, layers, states)
        rows = zip(tokens, layers, states, strict=True)
        return torch.cat([run(prompt, [ids], place, [layer], state[None]) for ids, layer, state in rows])

    def _reread(self, prompt, tokens, place, layers, states):
        ids = torch.tensor([[*prompt, *more] for more in tokens])
        with self._changing(*ids.shape, _writer(place - len(tokens[0]), layers, states)):
            return self._forward(ids)[:, len(prompt) - 1 :]

    def _decoded(self, prompt, tokens, place, layers, states):
        ids = torch.tensor([prompt] * len(layers))
        forced = torch.tensor([[*more, 0] for more in tokens])

        def force(given, scores):
            return torch.zeros_like(scores).scatter(1, forced[:, given.shape[1] - len(prompt), None], 1.0)

        first = self._changing(*ids.shape, _writer(place, layers, states), once=True)
        with torch.no_grad(), fresh(self.module), first:
            ran = self.module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=forced.shape[1],
                do_sample=False,
                eos_token_id=None,
                logits_processor=[force],
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(ran.logits, 1).float()

    def _forward(self, ids):
        with torch.no_grad(), fresh(self.module):
            return self.module(input_ids=ids, use_cache=False).logits.float()

    @contextmanager
    def _changing(self, n_rows, n_tokens, change, *, once=False):
        """Pass each block's output, or with `once` its first, as (n_rows, n_tokens, width), to a function."""

        def hook_of(layer):
            def hook(_module, _args, output):
                if once:
                    handles[layer].remove()
                first = output[0] if isinstance(output, tuple | list) else output
                axes = _axes(first.shape, n_rows, n_tokens)
                rows = first.permute(axes)
                changed = change(layer, rows.reshape(*rows.shape[:2], -1)).reshape(rows.shape)
                changed = changed.permute([axes.index(axis) for axis in range(len(axes))])
                if not isinstance(output, tuple | list):
                    return changed
                make = getattr(type(output), "_make", type(output))  # a named tuple, a tuple or a list
                return make([changed, *output[1:]])

            return hook

        handles = [block.register_forward_hook(hook_of(layer)) for layer, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _axes(shape, n_rows, n_tokens):
    """The order of a block's axes that puts rows first, then tokens; several streams belong to the state."""
    if len(shape) == 3:
        return [1, 0, 2] if shape[0] == n_tokens and shape[1] == n_rows != n_tokens else [0, 1, 2]
    return [0, 1, 2, 3] if shape[:2] == (n_rows, n_tokens) else [1, 2, 0, 3]


def _writer(place, layers, states):
    """Write each row's state at a place, counted from the end, in what its layer gives."""
    layers = torch.tensor(layers)

    def write(layer, found):
        (those,) = torch.where(layers == layer)
        found = found.clone()
        found[those, place] = states[those]
        return found

    return write


@contextmanager
def fresh(module):
    """Put back afterwards what a forward leaves behind in the attributes and buffers of a model's parts."""
    parts = list(module.modules())
    kept = [dict(part.__dict__) for part in parts]
    buffers = [dict(part._buffers) for part in parts]
    values = [
        {name: value.clone() for name, value in found.items() if value is not None} for found in buffers
    ]
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
