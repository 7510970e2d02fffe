"""Models with random weights in the shapes of real ones, made on the device, and a tokenizer made in code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import patchscope_nn as ps
from benchmarks.speed.made import corpus
from benchmarks.speed.workloads import SEED
from patchscope_nn.models import Model

_LONGEST = 8192
#: The standard deviation of random weights times the root of d_model; 4,096 dimensions have the usual 0.02.
_SPREAD = 1.28
_UNKNOWN = "<unk>"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama-like model.

    Attributes:
        title: How tables call it.
        n_layers: Decoder blocks.
        d_model: The width of the residual stream.
        d_mlp: The width inside an MLP.
        n_heads: Query heads.
        n_kv_heads: Key and value heads.
        vocab_size: Tokens.
    """

    title: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int


SHAPES = {
    "llama-8b": Shape(
        title="the shape of Llama 3.1 8B",
        n_layers=32,
        d_model=4096,
        d_mlp=14_336,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=128_256,
    ),
    "32b": Shape(
        title="the shape of Qwen 2.5 32B",
        n_layers=64,
        d_model=5120,
        d_mlp=27_648,
        n_heads=40,
        n_kv_heads=8,
        vocab_size=152_064,
    ),
    "tiny": Shape(
        title="a tiny shape", n_layers=4, d_model=64, d_mlp=128, n_heads=4, n_kv_heads=2, vocab_size=4096
    ),
}


def make_model(
    shape: Shape, *, device: torch.device, dtype: torch.dtype, n_layers: int | None = None, proof: bool = True
) -> Model:
    """Make a model with random weights on a device, without a copy on the CPU.

    Args:
        shape: Its sizes.
        device: Where it is made.
        dtype: Of its weights.
        n_layers: How many blocks it has; None is as many as the shape.
        proof: Whether its structure is proven, as for every model that is loaded.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=n_layers or shape.n_layers,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=_LONGEST,
        initializer_range=_SPREAD / shape.d_model**0.5,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    module.eval().requires_grad_(False)
    return ps.load(module, tokenizer=make_tokenizer(shape.vocab_size), proof=proof)


def make_tokenizer(vocab_size: int) -> Any:
    """A tokenizer with a token for each word of the workloads' texts, and exactly `vocab_size` tokens.

    Real texts have nearly as many tokens as words, and each id that a random model says has a text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitting = pre_tokenizers.Whitespace()
    words = dict.fromkeys(
        word for text in corpus() for word, _ in splitting.pre_tokenize_str(text) if word != _UNKNOWN
    )
    names = [_UNKNOWN, *(f"<{number}>" for number in range(1, vocab_size - len(words))), *words]
    if len(names) != vocab_size:
        raise ValueError(f"The texts have {len(words)} words, which {vocab_size} tokens cannot name.")
    level = models.WordLevel(vocab={name: number for number, name in enumerate(names)}, unk_token=_UNKNOWN)
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = splitting
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=_UNKNOWN)
