"""Interventions by plain PyTorch hooks: any number of changes to one forward of one prompt.

As in `hooks.py`, every token that is generated costs a whole new forward without a cache, in which everything
that is done to the prompt is done again. Nothing here knows of patchscope_nn or nnsight.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager

import hooks
import tiny
import torch


class Hand:
    """A tiny model that nothing but hooks touches."""

    def __init__(self, family, **options):
        self.reference = tiny.reference(family, **options)
        self.blocks = self.reference.blocks
        self._known = {}  # what a state is, is one fact
        self.parts = dict(zip(("attention", "mlp"), self.reference.parts, strict=True))

    def run(self, ids, *changes):
        """The logits after every token, (n_tokens, vocab), of a forward with changes made in their order."""
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            with torch.no_grad():
                return self.reference.module(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    def state(self, ids, layer, positions, *, site="residual", changes=()):
        """The states at a place, (n_positions, d_model)."""
        key = (ids, layer, tuple(positions), site)
        if not changes and key in self._known:
            return self._known[key]
        found = []

        def read(states):
            found.append(states[list(positions)].clone())
            return states

        self.run(ids, *changes, self.change(layer, read, site=site))
        if not changes:
            self._known[key] = found[0]
        return found[0]

    @contextmanager
    def change(self, layer, new, *, site="residual"):
        """Pass the states at a place, (n_tokens, d_model), through a function."""

        def before(_module, args, kwargs):
            if args:
                return (new(args[0][0])[None], *args[1:]), kwargs
            return args, kwargs | {"hidden_states": new(kwargs["hidden_states"][0])[None]}

        def after(_module, _args, output):
            first = output[0] if isinstance(output, tuple) else output
            changed = new(first[0] if first.ndim == 3 else first).view_as(first)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        if layer == hooks.EMBED or site == "before":
            block = self.blocks[max(layer, 0)]
            handle = block.register_forward_pre_hook(before, with_kwargs=True)
        else:
            part = self.blocks[layer].get_submodule(self.parts.get(site, ""))
            handle = part.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def write(self, layer, positions, new, *, site="residual"):
        """Replace the states of some positions by a function of them, (n_positions, d_model)."""

        def changed(states):
            states = states.clone()
            states[list(positions)] = new(states[list(positions)])
            return states

        return self.change(layer, changed, site=site)

    @contextmanager
    def unseen(self, layer, tokens, unseen, *, window=None):
        """Call a block with a mask, (1, 1, n_tokens, n_tokens), in which tokens do not see others."""
        block = self.blocks[layer]
        names = [name for name in inspect.signature(block.forward).parameters if name != "self"]

        def masked(_module, args, kwargs):
            given = dict(zip(names, args, strict=False)) | kwargs
            count = given["hidden_states"].shape[1]
            mask = torch.full((count, count), torch.finfo(torch.float32).min)
            for token in range(count):
                first = 0 if window is None else max(0, token - window + 1)
                hidden = set(unseen) - {token} if token in tokens else set()
                mask[token, [at for at in range(first, token + 1) if at not in hidden]] = 0
            given["attention_mask"] = mask[None, None]
            return (), given

        handle = block.register_forward_pre_hook(masked, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def decode(self, ids, changes, *, count):
        """Greedy decoding; `changes(n)` gives what is done in a forward over n tokens."""
        said = []
        while len(said) < count:
            said.append(self.run((*ids, *said), *changes(len(ids) + len(said)))[-1].argmax().item())
        return hooks.cut(said, eos=[tiny.EOS_ID])

    def read(self, readout, ids, changes, *, continuations=()):
        """What a readout gives, but `hidden`; `changes` as in `decode`."""
        if readout.name == "next_token":
            return hooks.next_token(self.run(ids, *changes(len(ids)))[readout.position], top_k=readout.top_k)
        if readout.name == "generate":
            return self.decode(ids, changes, count=readout.max_new_tokens)
        runner = _Changed(self, changes)
        return hooks.choices(runner, ids, None, continuations=continuations)


class _Changed:
    """What `hooks.choices` asks for its logits."""

    def __init__(self, hand, changes):
        self.hand, self.changes = hand, changes

    def logits(self, ids, _patch):
        return self.hand.run(ids, *self.changes(len(ids)))


def ids_of(text):
    return tuple(tiny.TOKENIZER(text)["input_ids"])


def same_in_every_way(run_cells, optimisations, *args, rehearsed=False, **options):
    """The cells of a run, which without any optimisation, and rehearsed, gives the same numbers."""
    found = run_cells(*args, **options)
    others = [run_cells(*args, **options, optimisations=optimisations)]
    if rehearsed:
        others.append(run_cells(*args, **options, remote="local"))
    for other in others:
        for (cell, given), (again, expected) in zip(found, other, strict=True):
            assert cell == again
            hooks.assert_same(given, expected)
    assert found
    return found
