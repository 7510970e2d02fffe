"""An adapter on M*, against peft's own model with hooks; and what cannot be worn."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch

import patchscope_nn as ps

peft = pytest.importorskip("peft")


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter for the tiny Llama, whose random weights change what it says."""
    place = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=16)
    worn = peft.get_peft_model(tiny.make_module("llama"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in worn.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    worn.save_pretrained(place)
    return place


def asked(adapter=None):
    return ps.Patchscope(
        source=ps.Source(prompt="The Eiffel Tower", layer=[0, 2]),
        target=ps.Target(prompt="Diana is x", position="x", layer=1, adapter=adapter),
        readout=ps.NextToken(top_k=3),
    )


def test_the_target_wears_it_and_the_source_does_not(adapter, tiny_model):
    model = tiny_model()
    table = ps.run(asked(str(adapter)), model=model, controls=["unpatched"]).table()
    worn = peft.PeftModel.from_pretrained(tiny.make_module("llama"), adapter).merge_and_unload().eval()
    kind = tiny.FAMILIES["llama"]
    source = tiny.reference("llama")
    target = hooks.Reference(worn, blocks=kind.blocks, attention=kind.attention, mlp=kind.mlp)
    read = tuple(model.tokenizer("The Eiffel Tower")["input_ids"])
    written = tuple(model.tokenizer("Diana is x")["input_ids"])
    for row in table.to_dict("records"):
        patch = None
        if row["control"] is None:
            state = source.state(read, hooks.Site(row["source_layer"]), (len(read) - 1,))
            patch = hooks.Patch(hooks.Site(1), (len(written) - 1,), lambda _clean, state=state: state)
        expected = hooks.next_token(target.logits(written, patch)[-1], top_k=3)
        assert row["top_ids"] == expected["top_ids"]
        assert row["top_probs"] == pytest.approx(expected["top_probs"], abs=1e-4)
    assert set(table["target_model"]) == {f"{model.info.name}+{adapter}"}
    assert set(table["source_model"]) == {model.info.name}
    plain = ps.run(asked(), model=model).table()
    assert plain["top_probs"].tolist() != table[table.control.isna()]["top_probs"].tolist()


def test_a_folder_without_an_adapter_is_a_message(tmp_path, tiny_model):
    with pytest.raises(ps.InputError, match=r"target\.adapter: .* cannot be put on .*adapter_config\.json"):
        ps.run(asked(str(tmp_path)), model=tiny_model())
