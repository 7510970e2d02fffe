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
    (r"forced_\w+", None),
    (r".*(token_id|token_index|im_\w+_id|image_patch_id)", IMAGE_ID),
    (r"(num_)?(hidden_layers|layers|decoder_layers|encoder_layers|blocks)|n_layers?", N_LAYERS),
    (r"max_window_layers|num_kv_shared_layers|n_layers_per_attn_res_block|num_layers_per_stack", 2),
    (r"sliding_window(_size)?|attention_window_size|local_attention|window_size|keep_window_size", WINDOW),
    (r"attention_chunk_size|local_attention_window_len", WINDOW),
    (r"original_max_position_embeddings|floor_scale|log_scaling_n_floor|rel_extent", THRESHOLD),
    (r"index_topk|index_block_size|\w*chunk_size", 4),
    (r"index_kpool|index_topk_blocks", 2),
    (
        r"\w*position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions|context_length",
        256,
    ),
    (r"hidden_size_per_layer_input|ple_embed_dim|d_rel|router_hidden_size|qk_head_dim", 8),
    (
        r"(attention_|cross_attention_|backbone_|text_)?hidden_size(_global)?|d_model|n_embd|\w*emb\w*_dim|\w*embedding_size",
        32,
    ),
    (r"word_embed_proj_dim|dim_model_base|lru_width|projection_dim", 32),
    (r"mamba_d_ssm", 64),
    (r"projector_hidden_size|\w*projection_hidden_size", 16),
    (r"out_hidden_size", 32),
    (
        r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads|n_mamba_heads|n_groups|\w*n_?groups|o_groups",
        2,
    ),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 4),
    (r"index_n_heads", 32),  # with few, many tokens score exactly 0, and which of them come first is chance
    (r"(\w+_)?head_dim|dim_head|d_kv|d_head|kv_channels|attention_head_size", 8),
    (r"(\w+_)?heads?(_per_ngram)?", 4),
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
    (r"out_hidden_size|text_hidden_size|output_dim|projector_output_dim|adapter_out_dim", 32),
    (
        r"(projection_|encoder_)?hidden_size|adapter_in_dim|adapter_input_size|d_model|embed_dim|\w*projection_dim",
        16,
    ),
    (r"image_size|\w*_image_size|resolution", 16),
    (r"patch_size", 8),
    (r"(\w+_)?heads?|num_key_value_heads|cross_attention_heads", 2),
    (r"head_dim", 8),
    (
        r"intermediate_size|mlp_dim|\w*ffn_dim|output_channels|base_channels|latent_channels|\w*intermediate_size",
        16,
    ),
    (r"\w*position_embeddings|max_source_positions|num_embeddings|pos_emb_\w+", 16),
    (r"window_size|\w*window", 2),
)

_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}  # of half a head
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_MIXED = ["linear_attention", "full_attention"] * 2
_IMAGES = {"rope_parameters": _SECTIONS}
#: What a family needs besides, by the model type of the config.
EXTRA = {
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "qwen2_vl_text", "qwen2_5_vl_text"), _IMAGES),
    **dict.fromkeys(("paddleocr_vl_text", "qwen2_5_omni_text", "qwen3_vl_text"), _IMAGES),
    **dict.fromkeys(("qwen3_vl_moe_text", "cosmos3_edge_text", "cosmos3_omni_text"), _IMAGES),
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA | {"layer_types": _MIXED},
    "mamba2": {"head_dim": 16},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mimo_v2_flash": {"swa_num_key_value_heads": 2, "swa_num_attention_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": IMAGE_ID},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": IMAGE_ID},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "qwen3_omni_moe_text": _IMAGES | {"sliding_window": None},  # its code has no windows, only its cache
    "moshi": {"sliding_window": 256},  # the same; real ones end there
    "zaya": {"num_experts_per_tok": 1},
    "hunyuan_vl_text": {"rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 1, 1]}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 2]},
        "moe_intermediate_size": [16, 8],
    },
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _SECTIONS)
    },
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": THRESHOLD,
        }
    },
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 8},
    "gemma3n_text": {"intermediate_size": 48},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 8,
        "swa_qk_nope_head_dim": 4,
        "swa_v_head_dim": 8,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 100,
        "make_ngram_vocab_size_divisible_by": 2,
        "split_ngram_parts": 2,
        "ple_embed_dim": 32,
    },
    "glm4v_moe_text": {
        "rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "molmo2_adapter": {"vision_feature_layer": [0, 0]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 16,
            "image_size": 16,
            "patch_size": 8,
        },
    },
    "radio": {"video_temporal_patch_size": 2},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1], "num_embeddings": 16},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1], "num_embeddings": 16},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE_ID}},
    "florence_vision": {
        "depths": (1,) * 4,
        "embed_dim": (16,) * 4,
        "num_heads": (2,) * 4,
        "num_groups": (2,) * 4,
    },
    "muse_spark_audio": {"out_hidden_size": 32},
    "blt": {"encoder_hash_byte_group_vocab": 50},
}


def config_of(model_type):
    """A tiny config of a model type."""
    return _tiny(CONFIG_MAPPING[model_type](), _TEXT)


def _tiny(default, rules):
    """The same config with every size tiny."""
    fields = vars(default)
    chosen = {}
    for name in inspect.signature(type(default)).parameters:
        value = fields.get(name)
        if isinstance(value, PreTrainedConfig):
            is_tower = re.search("vision|audio|vq|sam_|qformer|protein", name)
            chosen[name] = _tiny(value, _TOWER if is_tower else rules)
        else:
            chosen[name] = _value(name, value, fields, rules)
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return type(default)(**chosen | EXTRA.get(default.model_type, {}))


def _value(name, value, fields, rules):
    """The tiny value of a field; None keeps the default."""
    if isinstance(value, bool):
        return True if name == "use_sliding_window" else None
    if isinstance(value, list | tuple):
        return _of_each_layer(name, value, fields, rules)
    if value == 0 and not name.endswith(("_id", "_index")):
        return None  # what a family switches off stays off
    if name == "num_key_value_heads" and "kv_lora_rank" in fields:
        return 4  # latent attention has no groups
    if name == "head_dim" and value and fields.get("qk_rope_head_dim"):
        return 4 * value // fields["qk_rope_head_dim"]
    fits = value is None or isinstance(value, int | float)
    matches = (new for pattern, new in rules if re.fullmatch(pattern, name))
    return next(matches, None) if fits else None


def _of_each_layer(name, values, fields, rules):
    """A list of what each layer is, cut to the layers there are; other lists are left."""
    if len(values) != fields.get("num_hidden_layers") and name != "layer_types":
        return None
    if rules is _TOWER:
        return values[:1]
    kinds = _first_layers(values)
    if name == "layer_types" and set(kinds) == {"full_attention"} and "sliding_window" in fields:
        return ["sliding_attention", "full_attention"] * 2
    return kinds


def _first_layers(values):
    """Every kind that occurs, in four layers; of a list of layers those that there are."""
    if all(isinstance(value, int) for value in values) and list(values) == sorted(set(values)):
        return [value for value in values if value < N_LAYERS]
    kinds = list(dict.fromkeys(values))
    return (kinds * N_LAYERS)[:N_LAYERS]
