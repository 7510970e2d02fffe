"""A tiny random model of every model type that transformers can load as a language model.

`names()` reads transformers' own registries. `build(name)` makes the smallest useful model of a type by a recipe
(tests/registry_sizes.py) that goes by the names of the config's fields, so that a new type needs no code here.
"""

from __future__ import annotations

import copy

import registry_sizes
import tiny
import torch
import transformers
from transformers.models.auto import modeling_auto

#: Model types that no tiny model can be built of, with the reason.
NOT_BUILT = {}


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
    if model.generation_config is not None:
        model.generation_config.eos_token_id = tiny.EOS_ID
    tiny._spread(model, seed)
    return model
