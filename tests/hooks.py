"""The reference: Patchscopes by plain PyTorch forward hooks, straight from the paper's definition.

One cell at a time, batch 1, no padding, no cache of keys and values: every token that is generated or scored
takes a whole new forward pass, in which the prompt is read again with the patch. A reference remembers its
results, so tests that ask for the same pass share it. Nothing here knows of patchscope_nn or nnsight.

(S, i, l, M) --f--> (T, i*, l*, M*), Ghandeharioun et al. 2024, section 3.1: h is the output of block l of M
at position i of S; in the run of M* on T, the output of block l* at position i* is replaced by f(h).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import torch

EMBED = -1


class Site(NamedTuple):
    """A place in a model: the output or the input of a block or of its part; layer -1 is the embedding."""

    layer: int
    part: str = ""
    end: str = "output"


class Patch(NamedTuple):
    """f(h), computed from the states that are about to be replaced, and where it goes.

    Patches with equal sites, positions and `key` write the same states. A key of None equals no other.
    """

    site: Site
    positions: tuple
    new: object
    key: object = None


class Reference:
    """A transformers model, the path of its blocks, and what these call their attention and their MLP.

    The model's weights must not change: results are remembered.
    """

    def __init__(self, module, *, blocks, attention, mlp):
        self.module, self.blocks = module, module.get_submodule(blocks)
        self.parts = (attention, mlp)
        self._results = {}

    def state(self, ids, site, positions):
        """The hidden states at a site, (n_positions, d_model)."""
        return self._remembered(
            (tuple(ids), site, tuple(positions)), lambda: self._state(ids, site, positions)
        )

    def logits(self, ids, patch=None):
        """The logits after every token, (n_tokens, vocab), of a run that is patched or not."""
        if patch is None:
            return self._remembered(tuple(ids), lambda: self._forward(ids))
        if patch.key is None:
            return self._patched(ids, patch)
        key = (tuple(ids), patch.site, tuple(patch.positions), patch.key)
        return self._remembered(key, lambda: self._patched(ids, patch))

    def _remembered(self, key, compute):
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key].clone()

    def _state(self, ids, site, positions):
        found = {}

        def read(states):
            found["states"] = states[0, list(positions)].clone()
            return states

        with self._hooked(site, read):
            self._forward(ids)
        return found["states"]

    def _patched(self, ids, patch):
        def write(states):
            states = states.clone()
            where = list(patch.positions)
            states[0, where] = patch.new(states[0, where])
            return states

        with self._hooked(patch.site, write):
            return self._forward(ids)

    def _forward(self, ids):
        with torch.no_grad():
            return self.module(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    @contextmanager
    def _hooked(self, site, change):
        """Pass what a site gives, as (1, n_tokens, d_model), through a function."""

        def shaped(states):
            return change(states if states.ndim == 3 else states[None]).view_as(states)

        def before(_module, args, kwargs):
            if args:
                return (shaped(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": shaped(kwargs["hidden_states"])}

        def after(_module, _args, output):
            first = output[0] if isinstance(output, tuple) else output
            changed = shaped(first)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        module = self.blocks[max(site.layer, 0)].get_submodule(site.part)
        if site.layer == EMBED or site.end == "input":
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


def next_token(logits, *, top_k, reference_ids=(), source_logits=None, from_source=False):
    """The distribution's top, its entropy, and what it says of the reference tokens."""
    logprobs = torch.log_softmax(logits, -1)
    top = torch.sort(logprobs, descending=True).indices[:top_k]
    found = {
        "top_ids": top.tolist(),
        "top_probs": logprobs[top].exp().tolist(),
        "entropy_nats": -(logprobs.exp() * logprobs).sum().item(),
    }
    if source_logits is not None:
        source = torch.log_softmax(source_logits, -1)
        found["surprisal_nats"] = -source[top[0]].item()
        found["kl_nats"] = (source.exp() * (source - logprobs)).sum().item()
        found["source_top_ids"] = torch.sort(source, descending=True).indices[:top_k].tolist()
        if from_source:
            reference_ids = (source.argmax().item(),)
    if reference_ids:
        order = torch.sort(logprobs, descending=True).indices.tolist()
        found["reference_ids"] = list(reference_ids)
        found["reference_logprobs"] = [logprobs[one].item() for one in reference_ids]
        found["reference_ranks"] = [1 + order.index(one) for one in reference_ids]
        found["nll_nats"] = -logprobs[reference_ids[0]].item()
    return found


def generate(model, ids, patch, *, max_new_tokens):
    """Greedy decoding. The patch touches the prompt's tokens only, which every forward reads anew."""
    said = []
    while len(said) < max_new_tokens:
        said.append(model.logits((*ids, *said), patch)[-1].argmax().item())
    return said


def cut(said, *, eos=(), stops=()):
    """A decoded text up to its end, which is no part of it, or up to and with its stop."""
    for place, token in enumerate(said):
        if token in eos:
            return {"token_ids": said[:place], "stopped": "eos"}
        if token in stops:
            return {"token_ids": said[: place + 1], "stopped": "stop"}
    return {"token_ids": said, "stopped": "length"}


def choices(model, ids, patch, *, continuations):
    """The summed log-probability of each continuation, and these normalised."""
    summed = []
    for continuation in continuations:
        logprobs = torch.log_softmax(model.logits((*ids, *continuation), patch), -1)
        rows = logprobs[len(ids) - 1 : -1]
        summed.append(sum(row[token].item() for row, token in zip(rows, continuation, strict=True)))
    probs = torch.softmax(torch.tensor(summed, dtype=torch.float64), -1)
    return {"choice_logprobs": summed, "choice_probs": probs.tolist()}


def identity(states, clean):
    return states


class Pair:
    """Two models and a scope (read as plain attributes): what the reference says of a cell."""

    def __init__(self, scope, source, target=None, *, tokenizer, f=identity, eos=(), sites=None):
        self.scope, self.source, self.target = scope, source, target or source
        self.tokenizer, self.f, self.eos = tokenizer, f, eos
        self.sites = sites or {}  # by name: the place of a layer at a site

    def expected(self, cell, row):
        """The raw readout of a cell whose positions and layers are given by numbers."""
        source = self._ids(self.scope.source.prompt, row)
        given = self.scope.target.prompt
        target = source if given is None else self._ids(given, row)
        patch = None if cell.target_layer is None else self._patch(cell, source)
        return getattr(self, f"_{self.scope.readout.name}")(row, source, target, cell, patch)

    def _ids(self, prompt, row):
        if not isinstance(prompt, str):
            return tuple(prompt)
        return tuple(self.tokenizer(prompt.format(**row))["input_ids"])

    def _text_ids(self, text, row):
        return tuple(self.tokenizer(text.format(**row), add_special_tokens=False)["input_ids"])

    def _patch(self, cell, source):
        read, written = self._site("source", cell.source_layer), self._site("target", cell.target_layer)
        place = (source, read, cell.source_positions)
        states = self.source.state(*place)
        key = (self.source, place) if self.f is identity else None
        return Patch(written, cell.target_positions, lambda clean: self.f(states, clean), key)

    def _site(self, side, layer):
        name = getattr(self.scope, side).site
        if name in self.sites:
            return self.sites[name](layer)
        parts = {"residual": "", "attention": self._part(side, 0), "mlp": self._part(side, 1)}
        return Site(layer, parts[name])

    def _part(self, side, number):
        return getattr(self, side).parts[number]

    def _next_token(self, row, source, target, cell, patch):
        readout = self.scope.readout
        named = readout.reference if isinstance(readout.reference, tuple) else ()
        before = None
        if readout.reference is not None:
            before = self.source.logits(source)[self._compared(cell)]
        return next_token(
            self.target.logits(target, patch)[readout.position],
            top_k=readout.top_k,
            reference_ids=[self._text_ids(text, row)[0] for text in named],
            source_logits=before,
            from_source=readout.reference == "source",
        )

    def _compared(self, cell):
        """The last position that is read; of an unpatched cell the sweep alone knows it."""
        return cell.source_positions[-1] if cell.source_positions else cell.reference[1]

    def _generate(self, row, source, target, cell, patch):
        readout = self.scope.readout
        stops = ()
        if readout.stop:
            texts = [self.tokenizer.decode([one]) for one in range(len(self.tokenizer))]
            stops = [one for one, text in enumerate(texts) if readout.stop in text]
        said = generate(self.target, target, patch, max_new_tokens=readout.max_new_tokens)
        return cut(said, eos=self.eos, stops=stops)

    def _choices(self, row, source, target, cell, patch):
        ids = [self._text_ids(text, row) for text in self.scope.readout.continuations]
        return choices(self.target, target, patch, continuations=ids)

    def _hidden(self, row, source, target, cell, patch):
        if patch is None:
            return {"hidden": None}
        clean = self.target.state(target, patch.site, patch.positions)
        return {"hidden": patch.new(clean).tolist()}


def assert_same(given, expected, *, tolerance=1e-4):
    """Two readouts agree: texts, ids and ranks exactly, numbers to the tolerance."""
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        if not isinstance(value, float | list) or name.endswith(("ids", "ranks")):
            assert given[name] == value, name
        else:
            one, other = torch.tensor(given[name]), torch.tensor(value)
            assert one.shape == other.shape, name
            assert (one - other).abs().max() <= tolerance, (name, given[name], value)
