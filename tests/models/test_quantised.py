"""Quantised models: weights that are packed, as bitsandbytes packs them; and scales that tokens share."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn.errors import ModelError


class Packed(torch.nn.Module):
    """A linear map whose weights are bytes in a column, as bitsandbytes keeps them, with a scale a row."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        packed = ((linear.weight.detach() / scale).round() + 128).to(torch.uint8).reshape(-1, 1)
        self.register_buffer("scale", scale)
        self.keep(packed)

    def keep(self, packed):
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def packed(self):
        return self.weight

    def forward(self, states):
        weight = (self.packed().view(self.out_features, self.in_features).float() - 128) * self.scale
        return torch.nn.functional.linear(states, weight)


class Hidden(Packed):
    """The same, where `weight` is a function, as in PyTorch's own quantised modules."""

    def keep(self, packed):
        self.bytes = torch.nn.Parameter(packed, requires_grad=False)

    def packed(self):
        return self.bytes

    def weight(self):
        return self.bytes


def quantised(kind, *, unembed):
    module = tiny.make_module("llama")
    for path, part in list(module.named_modules()):
        if isinstance(part, torch.nn.Linear) and (unembed or path != "lm_head"):
            module.set_submodule(path, kind(part))
    return module.eval()


@pytest.mark.parametrize("unembed", [True, False], ids=["all", "all but the unembedding"])
@pytest.mark.parametrize("kind", [Packed, Hidden])
def test_a_model_with_packed_weights_equals_hooks_on_itself(kind, unembed, tiny_model):
    model = ps.load(quantised(kind, unembed=unembed), tokenizer=tiny.TOKENIZER)
    plain = tiny_model().info
    assert model.info.sizes == plain.sizes
    assert (model.info.dtype, model.info.tied, model.info.device) == ("float32", False, "cpu")
    scope = ps.Patchscope(
        source=ps.Source(prompt="The Eiffel Tower", layer="all"),
        target=ps.Target(prompt="Diana is x in", position="x", layer="all"),
        readout=ps.NextToken(top_k=3),
    )
    reference = hooks.Reference(
        quantised(kind, unembed=unembed), blocks="model.layers", attention="self_attn", mlp="mlp"
    )
    source, target = (
        tuple(tiny.TOKENIZER(text)["input_ids"]) for text in ("The Eiffel Tower", "Diana is x in")
    )
    for cell in ps.run(scope, model=model).table().to_dict("records"):
        (place,) = cell["target_position"]
        state = reference.state(source, hooks.Site(cell["source_layer"]), (len(source) - 1,))
        patch = hooks.Patch(hooks.Site(cell["target_layer"]), (place,), lambda _clean, state=state: state)
        expected = hooks.next_token(reference.logits(target, patch)[-1], top_k=3)
        assert cell["top_ids"] == expected["top_ids"]
        assert cell["top_probs"] == pytest.approx(expected["top_probs"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
def test_a_model_in_which_tokens_share_a_scale_is_refused():
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization is deprecated"):
        module = torch.ao.quantization.quantize_dynamic(
            tiny.make_module("llama"), {torch.nn.Linear}, dtype=torch.qint8
        )
    with pytest.raises(ModelError) as raised:
        ps.load(module, tokenizer=tiny.TOKENIZER)
    assert str(raised.value) == (
        "'LlamaForCausalLM' is quantised by torch.ao.quantization.quantize_dynamic "
        "(model.layers.0.self_attn.q_proj): activations are rounded with one scale for all tokens of a pass, "
        "so that a token's state depends on the tokens after it and on the other prompts of its batch. "
        "Use the unquantised model, or quantise only its weights (bitsandbytes, torchao)."
    )
