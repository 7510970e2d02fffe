"""A tiny random model of every model type that transformers can load as a language model.

`names()` reads transformers' own registries. `build(name)` makes a tiny model of a type. Its recipe
(tests/registry_sizes.py) goes by the names of the config's fields, so most new types need no code here.
"""

from __future__ import annotations

import registry_sizes
import tiny
import torch
import transformers
from transformers.models.auto import modeling_auto

#: Model types that no tiny model can be built of, with the reason.
NOT_BUILT = {
    **dict.fromkeys(
        ("gemma3n", "fast_vlm", "perception_lm"), "its vision tower is one of timm's, which is not installed"
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "it makes music; AutoModelForCausalLM fails on its config"
    ),
    "gemma4_assistant": "its own default config is refused by its own check",
    "evolla": "it describes proteins; AutoModelForImageTextToText does not take its config",
}

#: Decoders that read a prompt otherwise than what they decode: PaliGemma reads it in both directions. Their
#: own `generate` defines what is right.
PREFIXES = ("paligemma",)

_ENCODERS = (
    *(
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
    ),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet", "xmod"),
)
_NEED_IMAGES = ("blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "pi0")
_STREAMS = ("deepseek_v4", "gemma3n_text", "glm5_next", "hy_v4", "qwen4_exp", "qwen4_exp_text")
_ENCODER_DECODERS = ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder")
#: Model types that a Patchscope cannot be run on, with the reason; all others should run.
REFUSED = {
    **dict.fromkeys(_ENCODERS, "an encoder as its config stands: tokens see those after them"),
    **dict.fromkeys(_ENCODER_DECODERS, "an encoder-decoder"),
    **dict.fromkeys(_NEED_IMAGES, "it does not run without an image"),
    **dict.fromkeys(_STREAMS, "it carries several streams from block to block, and no single state"),
    "cpmant": "it puts 32 tokens of its own before every prompt",
    "blt": "it reads bytes in patches",
    "diffusion_gemma": "it fills in a canvas of tokens, from noise",
    "gemma4_unified_assistant": "it drafts for another model, whose states it needs",
    "hrm_text": "its blocks run several times",
    "mllama": "some of its blocks run only with an image",
    "prophetnet": "its blocks run on the tokens and on guesses at the next ones",
    "unlimited_ocr": "it sees all of a prompt, and only the latest of the tokens it decodes",
    "reformer": "its blocks give two halves of a state",
}


def names():
    """Every model type of the two registries: text models first, then those that read images too."""
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return list(dict.fromkeys([*text, *images]))


def build(model_type, *, seed=0):
    """A tiny random model in float32 and eval mode; the same seed gives the same weights."""
    config = registry_sizes.config_of(model_type)
    text = model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = tiny.EOS_ID
    tiny._spread(model, seed)
    return model
