"""LoRA adapters: on M*, as a model, and put in by peft; each against peft's own model with hooks."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import patchscope_nn as ps
from patchscope_nn.backends import Places
from patchscope_nn.errors import ModelError
from patchscope_nn.models import with_adapter
from patchscope_nn.runs.loading import load_models

peft = pytest.importorskip("peft")


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


#: Merged or beside the weights, an adapter's product is rounded otherwise.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
#: torch.compile's own, when it is first used.
of_compile = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


def adapted(module, *, seed=0, **options):
    """peft's model of a tiny one, with a LoRA adapter whose random weights change what it says."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=16, **options)
    wrapper = peft.get_peft_model(module, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapper.named_parameters():
            if "lora_B" in name or (options.get("bias") == "all" and name.endswith("bias")):
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return wrapper.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, folder):
    """A folder with an adapter for the tiny Llama."""
    place = tmp_path_factory.mktemp("adapter")
    adapted(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(place)
    return place


def logits_of(module):
    with torch.no_grad():
        return module(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def matrices(model):
    return {weight.data_ptr() for weight in model.module.parameters() if weight.ndim > 1}


def asked(adapter=None):
    return ps.Patchscope(
        source=ps.Source(prompt="The Eiffel Tower", layer=[0, 2]),
        target=ps.Target(prompt="Diana is x", position="x", layer=1, adapter=adapter),
        readout=ps.NextToken(top_k=3),
    )


def test_the_target_has_the_adapter_and_the_source_does_not(adapter, tiny_model):
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
    with pytest.raises(ps.InputError, match=r"the adapter .* cannot be added to .*adapter_config\.json"):
        ps.run(asked(str(tmp_path)), model=tiny_model())


def test_a_folder_of_an_adapter_is_a_model(adapter, folder):
    model = ps.load(adapter)
    assert model.info.name == str(adapter)
    assert model.tokenizer.get_vocab() == tiny.TOKENIZER.get_vocab()
    expected = logits_of(AutoModelForCausalLM.from_pretrained(adapter))
    torch.testing.assert_close(logits_of(model.module), expected, **CLOSE)
    assert not torch.allclose(expected, logits_of(ps.load(folder).module), atol=0.1)


def test_the_adapter_s_own_tokenizer_comes_first(adapter, tmp_path):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tiny.make_tokenizer(bos=True).save_pretrained(tmp_path)
    assert ps.load(tmp_path).tokenizer("The")["input_ids"][0] == 0


@pytest.mark.parametrize("names", [("base", "adapter"), ("adapter", "base"), ("model", "adapter")])
def test_a_model_and_its_adapter_share_the_weights_it_leaves_alone(names, adapter, folder):
    given = {"base": str(folder), "adapter": str(adapter), "model": ps.load(str(folder))}
    source, target = load_models(
        places=Places(), **dict(zip(("source_model", "target_model"), map(given.get, names), strict=True))
    )
    base, worn = (source, target) if names[1] == "adapter" else (target, source)
    assert (base.info.name, worn.info.name) == (str(folder), str(adapter))
    # In each of the 4 blocks 3 of 7 matrices are changed.
    assert len(matrices(worn) - matrices(base)) == 3 * tiny.N_LAYERS
    assert torch.equal(logits_of(base.module), logits_of(ps.load(folder).module))
    torch.testing.assert_close(logits_of(worn.module), logits_of(ps.load(adapter).module))


def test_two_adapters_of_a_model_share_its_weights(adapter, folder, tmp_path):
    adapted(AutoModelForCausalLM.from_pretrained(folder), seed=1).save_pretrained(tmp_path)
    first, second = load_models(places=Places(), source_model=adapter, target_model=tmp_path)
    assert len(matrices(first) & matrices(second)) == 2 + 4 * tiny.N_LAYERS
    assert not torch.allclose(logits_of(first.module), logits_of(second.module), atol=0.1)


def test_a_base_is_left_as_it_is(tmp_path):
    """Adapters may bring biases, and peft freezes what it is put on."""
    module = tiny.make_module("gpt_neox")
    config = {"r": 4, "target_modules": ["query_key_value"], "bias": "all"}
    wrapper = peft.get_peft_model(tiny.make_module("gpt_neox"), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, weight in wrapper.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                weight.add_(1.0)
    wrapper.save_pretrained(tmp_path)
    before, frozen = logits_of(module), [weight.requires_grad for weight in module.parameters()]
    worn = with_adapter(ps.load(module, tokenizer=tiny.TOKENIZER), str(tmp_path))
    torch.testing.assert_close(logits_of(worn.module), logits_of(wrapper.eval()), **CLOSE)
    assert torch.equal(logits_of(module), before)
    assert [weight.requires_grad for weight in module.parameters()] == frozen


def test_a_model_that_peft_wraps(adapter, folder):
    """Peft changes the base in place, so the base's name includes the adapter."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = ps.load(peft.PeftModel.from_pretrained(base, adapter))
    assert model.module is base
    assert model.info.name == ps.load(base).info.name == f"{folder}+default"
    table, expected = (ps.run(asked(), model=one).table() for one in (model, ps.load(adapter)))
    assert table["top_ids"].tolist() == expected["top_ids"].tolist()
    assert table["top_probs"].tolist() == [pytest.approx(probs, abs=1e-4) for probs in expected["top_probs"]]


def test_what_peft_does_beside_the_weights_is_refused():
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    wrapper = peft.get_peft_model(tiny.make_module("llama"), config)
    with pytest.raises(ModelError, match=r"^a PeftModelForCausalLM with PROMPT_TUNING does more than"):
        ps.load(wrapper, tokenizer=tiny.TOKENIZER)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "does not name the model it is for"),
        ("{", "is not valid JSON"),
    ],
)
def test_an_adapter_s_config_that_is_wrong(text, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        ps.load(tmp_path)


def test_an_adapter_is_not_put_on_a_server_s_model(adapter):
    with pytest.raises(ModelError, match="would be merged into weights that are not in this process"):
        ps.load(adapter, weights=False)


@of_compile
def test_a_compiled_model_is_unwrapped():
    module = tiny.make_module("llama")
    assert ps.load(torch.compile(module), tokenizer=tiny.TOKENIZER).module is module


@of_compile
@pytest.mark.parametrize("path", ["", "model.layers.1"])
def test_what_is_compiled_in_place_is_refused(path):
    module = tiny.make_module("llama")
    module.get_submodule(path).compile()
    with pytest.raises(ModelError, match="is compiled in place"):
        ps.load(module, tokenizer=tiny.TOKENIZER)
