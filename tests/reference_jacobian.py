"""Jacobians by autograd's own functional jacobian, through the reference model."""

from __future__ import annotations

import tiny
import torch


def whole(family, ids, layer):
    """d (last block's states) / d (layer's states), (n_tokens, d_model, n_tokens, d_model)."""
    return whole_with_states(family, ids, layer)[0]


def whole_with_states(family, ids, layer):
    """The same, the layer's states, and the last block's, (n_tokens, d_model) each."""
    reference = tiny.reference(family)
    ids = torch.tensor([ids])
    out = {}

    def given(module, arguments, named):
        if arguments:
            return (out["h"][None], *arguments[1:]), named
        return arguments, named | {"hidden_states": out["h"][None]}

    def last(_module, _given, output):
        out["last"] = (output if isinstance(output, torch.Tensor) else output[0])[0]

    def final(states):
        out["h"] = states
        handles = [
            reference.blocks[layer + 1].register_forward_pre_hook(given, with_kwargs=True),
            reference.blocks[-1].register_forward_hook(last),
        ]
        reference.module(ids)
        for handle in handles:
            handle.remove()
        return out["last"]

    seen = {}
    handle = reference.blocks[layer + 1].register_forward_pre_hook(
        lambda _module, arguments, named: seen.update(
            h=arguments[0] if arguments else named["hidden_states"]
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        reference.module(ids)
    handle.remove()
    states = seen["h"][0].detach()
    return torch.autograd.functional.jacobian(final, states), states, final(states).detach()
