"""Models: loading, wrapping, describing, and what cannot be traced."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import tiny
import torch
from nnsight import TransformersModel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from patchscope_nn.errors import ModelError
from patchscope_nn.models import find_architecture, load, same_vocabulary
from patchscope_nn.spec import ATTENTION, MLP

NORMS = {
    "llama": "model.norm",
    "llama_tied": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gptj": "transformer.ln_f",
    "gemma2": "model.norm",
    "gemma3": "model.norm",
    "qwen2": "model.norm",
    "qwen3": "model.norm",
    "mistral": "model.norm",
    "phi3": "model.norm",
    "olmo2": "model.norm",
    "opt": "model.decoder.final_layer_norm",
}
WINDOWS = {
    "gemma2": (tiny.WINDOW, None) * 2,
    "gemma3": (tiny.WINDOW, None) * 2,
    "mistral": (tiny.WINDOW,) * 4,
}
USE = "Use a causal language model, for example one of the Llama, GPT-2, Qwen or Gemma families."
TIED = {"llama_tied", "gpt2", "opt"}
BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


#: Bert calls a module `output`, which nnsight serves under another name, and says so.
nnsight_renames = pytest.mark.filterwarnings("ignore:Module .* has a submodule named 'output':UserWarning")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_are_found(family, tiny_model):
    kind, info = tiny.FAMILIES[family], tiny_model(family).info
    found, module = info.architecture, tiny_model(family).module
    parts = [found.part(site).path for site in (ATTENTION, MLP)]
    assert [found.blocks, *parts] == [kind.blocks, kind.attention, kind.mlp]
    assert found.final_norm == NORMS[family]
    assert module.get_submodule(found.unembed) is module.get_output_embeddings()
    assert info.supports("cache")
    assert info.supports("packing")
    assert found.gives_tuples == (family == "gptj")
    assert found.windows == WINDOWS.get(family, (None,) * tiny.N_LAYERS)
    assert info.tied == (family in TIED)
    assert (info.n_layers, info.d_model, info.vocab_size) == (tiny.N_LAYERS, tiny.D_MODEL, tiny.VOCAB_SIZE)
    assert (info.n_positions, info.dtype, info.device) == (64, "float32", "cpu")
    assert same_vocabulary(tiny_model(family), tiny_model("llama"))


def test_a_loaded_model_is_returned_as_it_is(tiny_model):
    assert load(tiny_model()) is tiny_model()


def test_an_nnsight_model_is_wrapped():
    module = tiny.make_module("llama")
    traced = TransformersModel(module, task="text-generation", tokenizer=tiny.TOKENIZER)
    model = load(traced)
    assert model.traced is traced
    assert model.tokenizer is tiny.TOKENIZER
    assert model.module is module
    assert model.info.family == "llama"


def test_an_nnsight_model_without_its_weights_is_given_them(folder):
    tokenizer = tiny.make_tokenizer()
    traced = TransformersModel(str(folder), task="text-generation", tokenizer=tokenizer)
    assert not traced.dispatched
    model = load(traced)
    assert traced.dispatched
    assert (model.info.name, model.info.device) == (str(folder), "cpu")


@pytest.mark.quick
def test_a_folder_is_loaded(folder):
    model = load(folder, dtype=torch.float64)
    assert (model.info.name, model.info.dtype, model.info.revision) == (str(folder), "float64", None)
    assert model.tokenizer.get_vocab() == tiny.TOKENIZER.get_vocab()
    ids = torch.tensor([tiny.TOKENIZER("The Eiffel Tower")["input_ids"]])
    with torch.no_grad():
        given, expected = model.module(ids).logits, tiny.make_module("llama").double()(ids).logits
    assert torch.allclose(given, expected, atol=1e-5)


def test_options_reach_transformers(folder):
    model = load(str(folder), attn_implementation="eager", device_map="cpu")
    assert model.module.config._attn_implementation == "eager"


def test_a_module_in_training_is_left_in_training(run_cells):
    """Dropout is off while a Patchscope runs, and the model is given back as it was."""
    from patchscope_nn.readouts import NextToken
    from patchscope_nn.spec import Patchscope, Source

    module = tiny.make_module("gpt2").train()
    assert module.config.resid_pdrop > 0
    model = load(module, tokenizer=tiny.TOKENIZER)
    scope = Patchscope(source=Source(prompt="The Tower", layer=1), readout=NextToken())
    assert run_cells(scope, model)[0][1] == run_cells(scope, model)[0][1]
    assert module.training


@nnsight_renames
@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
            ),
            f"'T5ForConditionalGeneration' (t5) is an encoder-decoder; a Patchscope needs a decoder. {USE}",
            id="encoder-decoder",
        ),
        pytest.param(
            lambda: ViTForImageClassification(
                ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
            ),
            "'ViTForImageClassification' (ViTForImageClassification) has no unembedding, so that nothing can "
            "be read from it. Load it with its language modelling head: AutoModelForCausalLM.",
            id="no language model",
        ),
        pytest.param(
            lambda: BertLMHeadModel(BertConfig(**BERT)),
            "'BertLMHeadModel' (BertLMHeadModel) is an encoder: its tokens attend to later tokens. "
            "Use a causal language model.",
            id="encoder",
        ),
        pytest.param(
            lambda: LlamaModel(tiny.make_module("llama").config),
            "'LlamaModel' (LlamaModel) has no unembedding, so that nothing can be read from it. "
            "Load it with its language modelling head: AutoModelForCausalLM.",
            id="no unembedding",
        ),
        pytest.param(
            lambda: torch.nn.Linear(2, 2),
            "a Linear is not a model that can be traced. Give a Hugging Face id, a folder, a transformers "
            "model or an nnsight TransformersModel.",
            id="no transformers model",
        ),
        pytest.param(
            lambda: None,
            "a NoneType is not a model that can be traced. Give a Hugging Face id, a folder, a transformers "
            "model or an nnsight TransformersModel.",
            id="nothing",
        ),
    ],
)
def test_what_is_no_decoder(make, message):
    with pytest.raises(ModelError) as raised:
        load(make(), tokenizer=tiny.TOKENIZER)
    assert str(raised.value) == message


@nnsight_renames
def test_a_bert_that_is_a_decoder_is_one():
    """What decides is whether tokens see those after them, not the family."""
    model = load(BertLMHeadModel(BertConfig(**BERT, is_decoder=True)).eval(), tokenizer=tiny.TOKENIZER)
    assert model.info.architecture.blocks == "bert.encoder.layer"


def test_an_unknown_id():
    with pytest.raises(ModelError) as raised:
        load("nobody/no-such-model")
    assert str(raised.value).startswith("the model 'nobody/no-such-model' could not be loaded: ")
    assert raised.value.hint.startswith(
        "Check the id, your connection and (for gated models) your token; or use"
    )


def test_an_empty_folder(tmp_path):
    with pytest.raises(ModelError) as raised:
        load(tmp_path)
    assert str(raised.value).startswith(f"the model {str(tmp_path)!r} could not be loaded: ")
    assert raised.value.hint == "A model folder holds config.json, the weights and the tokenizer's files."


def test_a_folder_that_does_not_exist():
    with pytest.raises(ModelError, match=r"^the model './no/such' could not be loaded: ") as raised:
        load("./no/such")
    assert raised.value.hint.startswith("A model folder holds")


def test_a_folder_of_an_encoder_decoder(tmp_path):
    T5Config(vocab_size=50, d_model=16).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(t5\) is an encoder-decoder; a Patchscope needs a decoder"):
        load(tmp_path)


def test_a_folder_with_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded: "):
        load(tmp_path)


def test_a_folder_without_weights(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ModelError, match="could not be loaded: "):
        load(tmp_path)


def test_an_unknown_builtin():
    with pytest.raises(ModelError) as raised:
        load("builtin:gpt-5")
    assert str(raised.value) == (
        "'builtin:gpt-5' is not a builtin model. The only one is 'builtin:smollm2-135m-instruct'."
    )


def test_a_transformers_model_needs_its_tokenizer():
    with pytest.raises(ModelError) as raised:
        load(tiny.make_module("llama"))
    assert str(raised.value) == (
        "the tokenizer of 'LlamaForCausalLM' was not found. Give it: load(model, tokenizer=...)."
    )


def test_a_transformers_model_finds_its_tokenizer(folder):
    model = load(AutoModelForCausalLM.from_pretrained(folder))
    assert (model.info.name, model.tokenizer.eos_token) == (str(folder), tiny.EOS)


def test_blocks_that_cannot_be_found():
    module = tiny.make_module("llama")
    module.model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match=r"'odd' \(LlamaForCausalLM\) has no list of decoder blocks"):
        find_architecture(module, name="odd")


def test_vocabularies_are_compared(tiny_model):
    assert same_vocabulary(tiny_model(), tiny_model(bos=True))
    other = tiny.make_tokenizer()
    other.add_tokens(["another"])
    assert not same_vocabulary(tiny_model(), load(tiny.make_module("llama"), tokenizer=other))


#: Prints how many pages the system gives for a block of 64 MB, inside and outside.
_FAULTS = """
import resource, torch
from patchscope_nn.models import memory_reused

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with memory_reused():
    inside = min(faults() for _ in range(8))
print(inside, faults(), 2**26 // resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_used_again():
    """In a process of its own: how soon a freed block is taken again depends on what else the heap holds."""
    printed = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True
    ).stdout
    inside, outside, pages = map(int, printed.split())
    assert inside < pages / 10
    assert outside > pages / 2


@pytest.mark.parametrize("model", ["anything", "builtin:smollm2-135m-instruct"])
def test_a_dtype_that_is_none_is_named(model):
    with pytest.raises(ModelError, match=r"dtype='float23' is not a valid dtype") as caught:
        load(model, dtype="float23")
    assert "float32" in caught.value.hint
