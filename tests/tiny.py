"""Tiny random models of every architecture, and a tokenizer made in code: no Hub, no files.

Weights are spread out (see `_spread`), so that attention is peaked, argmax is decisive and a patch matters.
Windows and soft caps are set so low that they bite on prompts of a dozen tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import hooks
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

N_LAYERS = 4
D_MODEL = 32
WINDOW = 5
_SPREAD = 0.3

#: What the tokenizer knows as one token; a leading space belongs to the word, as in byte-level BPE. Every
#: beginning of one of these is a token too, and so is every character.
PIECES = ("The", " E", "iff", "el", " Tower", " is", " in", " the", " city", " of", " Paris", " Diana", "->")
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.:;?!-><|_\n"
BOS, EOS, PAD, START, END = "<bos>", "<eos>", "<pad>", "<start>", "<end>"
_CHAT = (
    "{% for message in messages %}<start>{{ message.role }}\n{{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def make_tokenizer(*, bos: bool = False, eos: bool = False, pieces=PIECES):
    """A byte-level BPE tokenizer that knows some pieces.

    With `bos` it puts <bos> before every text, with `eos` <eos> after it.
    """
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    symbols = ["".join(piece for piece, _ in level.pre_tokenize_str(letter)) for letter in _CHARACTERS]
    vocabulary = dict.fromkeys([BOS, EOS, PAD, START, END, *symbols])
    merges = {}
    for piece in pieces:
        letters = "".join(part for part, _ in level.pre_tokenize_str(piece))
        for end in range(1, len(letters)):
            merges[letters[:end], letters[end]] = None
            vocabulary[letters[: end + 1]] = None
    numbered = {token: number for number, token in enumerate(vocabulary)}
    core = Tokenizer(models.BPE(vocab=numbered, merges=list(merges)))
    core.pre_tokenizer = level
    core.decoder = decoders.ByteLevel()
    if bos or eos:
        core.post_processor = processors.TemplateProcessing(
            single=" ".join([*([BOS] if bos else []), "$A", *([EOS] if eos else [])]),
            special_tokens=[(BOS, 0), (EOS, EOS_ID)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        chat_template=_CHAT,
    )


EOS_ID = 1
VOCAB_SIZE = len(make_tokenizer())


class Family(NamedTuple):
    """One architecture: its config, and (for the reference, written down by hand) where its parts are."""

    config: str
    options: dict
    blocks: str
    attention: str
    mlp: str


def _llama_like(config, **options):
    common = {"num_key_value_heads": 2, "intermediate_size": 48}
    return Family(config, common | options, "model.layers", "self_attn", "mlp")


#: Tied, a random Gemma says the last token for ever: its embeddings are large, its logits their products.
_GEMMA = {
    "head_dim": 8,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,
    "final_logit_softcapping": 5.0,
}
_GPT2 = {"n_inner": 48}
FAMILIES = {
    "llama": _llama_like("LlamaConfig"),
    "llama_tied": _llama_like("LlamaConfig", tie_word_embeddings=True),
    "gpt2": Family("GPT2Config", _GPT2, "transformer.h", "attn", "mlp"),
    "gpt_neox": Family("GPTNeoXConfig", {"intermediate_size": 48}, "gpt_neox.layers", "attention", "mlp"),
    "gptj": Family("GPTJConfig", _GPT2 | {"rotary_dim": 4}, "transformer.h", "attn", "mlp"),
    "gemma2": _llama_like(
        "Gemma2Config",
        **_GEMMA,
        attn_logit_softcapping=5.0,
        attn_implementation="eager",  # the others would leave out the soft cap of the attention
    ),
    "gemma3": _llama_like("Gemma3TextConfig", **_GEMMA),
    "qwen2": _llama_like("Qwen2Config"),
    "qwen3": _llama_like("Qwen3Config", head_dim=8),
    "mistral": _llama_like("MistralConfig", sliding_window=WINDOW),
    "phi3": _llama_like("Phi3Config"),
    "olmo2": _llama_like("Olmo2Config"),
    "opt": Family(
        "OPTConfig",
        {"ffn_dim": 48},
        "model.decoder.layers",
        "self_attn",
        "fc2",
    ),
}


def make_module(
    family: str, *, seed: int = 0, d_model: int = D_MODEL, n_layers: int = N_LAYERS, vocab_size=None
):
    """A random transformers model; the same arguments give the same weights."""
    kind = FAMILIES[family]
    common = {
        "vocab_size": vocab_size or VOCAB_SIZE,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": EOS_ID,
        "pad_token_id": 2,
    }
    if family.startswith("gemma"):
        common["layer_types"] = ["sliding_attention", "full_attention"] * (n_layers // 2)
    if family == "opt":
        common["word_embed_proj_dim"] = d_model
    config = getattr(transformers, kind.config)(**common | kind.options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = EOS_ID
    _spread(model, seed)
    return model.eval()


def _spread(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:  # a norm's weights or a bias: near what they start from
                weight.add_(0.1 * noise)
            else:
                weight.copy_(_SPREAD * noise)


@functools.cache
def reference(family: str, **options):
    """A model of its own, which nothing but the reference ever touches."""
    kind = FAMILIES[family]
    return hooks.Reference(
        make_module(family, **options), blocks=kind.blocks, attention=kind.attention, mlp=kind.mlp
    )


TOKENIZER = make_tokenizer()
TOKENIZER_BOS = make_tokenizer(bos=True)
