"""Fitted mappings with random numbers, for tests of what is done with them."""

from __future__ import annotations

import torch

from patchscope_nn.mappings import Fitted, Provenance, Space


def space(d_model, name="LlamaForCausalLM"):
    return Space(name=name, d_model=d_model)


def random_fit(pairs, *, source=None, target=None, form="weight", bias=True, seed=0, **about):
    """A map for each pair, each with other numbers."""
    source, target = source or space(32), target or space(32)
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator) / 4

    shapes = {
        "weight": {"weight": (target.d_model, source.d_model)},
        "up": {"up": (target.d_model, 3), "down": (3, source.d_model)},
        "scale": {"scale": (1,)},
    }[form] | ({"bias": (target.d_model,)} if bias else {})
    maps = {pair: {name: drawn(*shape) for name, shape in shapes.items()} for pair in pairs}
    return Fitted(
        kind="affine", maps=maps, about=Provenance(source_model=source, target_model=target, **about)
    )


def formula(fitted, pair):
    """f of one pair, written out: its matrix and its offset."""
    parts = fitted.parts(pair)
    d_out = fitted.about.target_model.d_model
    if "weight" in parts:
        matrix = parts["weight"]
    elif "up" in parts:
        matrix = parts["up"] @ parts["down"]
    else:
        matrix = torch.eye(d_out) * parts["scale"]
    offset = parts.get("bias", torch.zeros(d_out))
    return lambda states, clean=None: states @ matrix.T + offset
