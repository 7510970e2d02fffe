"""The recipe for tiny configs: a value for every field, by its name."""

from __future__ import annotations

import inspect
import re

import tiny
from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig

N_LAYERS = 4
WINDOW = 5
THRESHOLD = 12
IMAGE_ID = 3  # <start>, which no prompt of the tests holds

#: The first pattern that matches a field's whole name gives its value, in the config of a text model ...
_TEXT = (
    (r".*vocab_size.*|codebook_size", tiny.VOCAB_SIZE),
    (r"bos_token_id", 0),
    (r"eos_token_id", 1),
    (r"pad_token_id", 2),
    (r".*(token_id|token_index|im_\w+_id|image_patch_id)", IMAGE_ID),
    (r"(num_)?(hidden_layers|layers|decoder_layers|encoder_layers|blocks)|n_layers?", N_LAYERS),
    (r"max_window_layers|num_kv_shared_layers|n_layers_per_attn_res_block|num_layers_per_stack", 2),
    (r"sliding_window(_size)?|attention_window_size|local_attention|window_size|keep_window_size", WINDOW),
    (r"attention_chunk_size|local_attention_window_len", WINDOW),
    (r"original_max_position_embeddings|floor_scale|log_scaling_n_floor|rel_extent", THRESHOLD),
    (r"index_topk|index_block_size|\w*chunk_size", 4),
    (r"index_kpool|index_topk_blocks", 2),
    (r"\w*position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions|context_length", 64),
    (r"hidden_size_per_layer_input|ple_embed_dim|d_rel|router_hidden_size|qk_head_dim", 8),
    (r"(attention_|cross_attention_|backbone_|text_)?hidden_size|d_model|n_embd|\w*emb\w*_dim|\w*embedding_size", 32),
    (r"word_embed_proj_dim|dim_model_base|lru_width|projection_dim", 32),
    (r"mamba_d_ssm", 64),
    (r"(\w+_)?(attention_)?heads?(_per_ngram)?", 4),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads|n_mamba_heads|n_groups|\w*n_?groups|o_groups", 2),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 4),
    (r"(\w+_)?head_dim|dim_head|d_kv|d_head|kv_channels|attention_head_size", 8),
    (r"\w*_rank|hc_lowrank", 8),
    (r"\w*moe_intermediate_size|expert_ffn_hidden_size|moe_hidden_size|share_expert_dim", 16),
    (r"(\w*intermediate_size\w*|\w*ffn_dim|d_ff|dim_ff|dff|ffn_hidden_size|feed_forward_size|d_inner)", 48),
    (r"num_experts_per_tok|moe_k|moe_top_?k|top_k_experts|n_group|zero_expert_num", 2),
    (r"num_experts|num_local_experts|moe_num_experts|n_routed_experts", 4),
    (r"\w*shared_experts|topk_group|first_k_dense_replace|num_dense_layers", 1),
    (r"\w*d_state|\w*state_size", 4),
    (r"logit_scale|logits_mup_width_multiplier|output_multiplier", 1.0),
)

#: ... and in the config of whatever reads images or sounds.
_TOWER = (
    (r"\w*vocab_size", 16),
    (r"vocab_offset", 0),
    (r"(num_)?(hidden_layers|layers|blocks|global_layers)|n_layers?|depth|num_res_blocks", 1),
    (r"out_hidden_size|text_hidden_size|output_dim|projector_output_dim", 32),
    (r"(projection_|encoder_)?hidden_size|d_model|embed_dim|\w*projection_dim", 16),
    (r"image_size|\w*_image_size|resolution", 16),
    (r"patch_size", 8),
    (r"(\w+_)?heads?|num_key_value_heads|cross_attention_heads", 2),
    (r"head_dim", 8),
    (r"intermediate_size|mlp_dim|\w*ffn_dim|output_channels|base_channels|latent_channels|\w*intermediate_size", 16),
    (r"\w*position_embeddings|max_source_positions|num_embeddings|pos_emb_\w+", 16),
    (r"window_size|\w*window", 2),
)

#: What a family needs besides, by the model type of the config.
EXTRA = {}


def config_of(model_type):
    """A tiny config of a model type."""
    kind = CONFIG_MAPPING[model_type]
    return _tiny(kind(**EXTRA.get(model_type, {})), _TEXT)


def _tiny(default, rules):
    """The same config with every size tiny."""
    fields = vars(default)
    chosen = {}
    for name in inspect.signature(type(default)).parameters:
        value = fields.get(name)
        if isinstance(value, PreTrainedConfig):
            chosen[name] = _tiny(value, _TOWER if re.search("vision|audio|vq|sam_|qformer|protein", name) else rules)
        else:
            chosen[name] = _value(name, value, default, rules)
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return type(default)(**chosen | EXTRA.get(default.model_type, {}))


def _value(name, value, default, rules):
    """The tiny value of a field; None keeps the default."""
    is_id = name.endswith(("_id", "_index"))
    if isinstance(value, bool):
        return True if name == "use_sliding_window" else None
    if value == 0 and isinstance(value, int) and not is_id:
        return None  # what a family switches off stays off
    if name == "layer_types":
        return _layer_types(value, default)
    if isinstance(value, list | tuple) and len(value) == getattr(default, "num_hidden_layers", None):
        return _first_layers(value)
    if name == "num_key_value_heads" and hasattr(default, "kv_lora_rank"):
        return 4  # latent attention has no groups
    if name == "head_dim" and getattr(default, "qk_rope_head_dim", 0):
        return 4 * default.head_dim // default.qk_rope_head_dim
    for pattern, new in rules:
        if re.fullmatch(pattern, name):
            return new if value is None or isinstance(value, type(new) | int) else None
    return None


def _layer_types(value, default):
    """Every kind of attention, in four layers; a family with a window uses it in some of them."""
    if not value:
        return None
    kinds = _first_layers(value)
    if set(kinds) == {"full_attention"} and hasattr(default, "sliding_window"):
        return ["sliding_attention", "full_attention"] * 2
    return kinds


def _first_layers(values):
    """Every kind that occurs, in four layers; of a list of layers those that there are."""
    if all(isinstance(value, int) for value in values) and list(values) == sorted(set(values)):
        return [value for value in values if value < N_LAYERS]
    kinds = list(dict.fromkeys(values))
    return (kinds * N_LAYERS)[:N_LAYERS]
