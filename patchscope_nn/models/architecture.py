"""Finding a model's parts, and measuring them. All code that depends on the architecture is in this file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from patchscope_nn.errors import ModelError
from patchscope_nn.models.block import run_block, states_of
from patchscope_nn.models.info import Architecture, Part, Sizes

#: The names of the final norm, for which transformers has no interface. The names of parts inside blocks are
#: in `spec/sites.py`.
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


def find_architecture(module: Any, *, name: str) -> Architecture:
    """Find a model's parts, and run a token through its first block to learn how blocks behave.

    Raises:
        ModelError: The blocks or the unembedding cannot be found, or the model cannot be used.
    """
    config = module.config.get_text_config()
    paths = {id(part): path for path, part in module.named_modules()}
    decoder = module.get_decoder()
    inside = f"{paths[id(decoder)]}." if paths.get(id(decoder)) else ""
    blocks, unembed = _find_blocks(module, inside), output_embeddings(module)
    if blocks is None or unembed is None:
        missing = "unembedding" if blocks else "list of decoder blocks"
        raise ModelError(
            f"{name!r} ({type(module).__name__}) has no {missing} that we can find.",
            hint="Please report the architecture; patchscope_nn/models/architecture.py is where it belongs.",
        )
    if "reference_sliding_attention" in (setting(config, "layer_types") or ()):
        raise ModelError(
            f"{name!r} ({type(module).__name__}): a decoded token attends to the whole prompt, but only to "
            "the latest decoded tokens. A token is computed differently in a prompt than in decoding.",
            hint="Use a model whose windows are the same for both.",
        )
    block = module.get_submodule(blocks)[0]
    block_arguments = tuple(inspect.signature(block.forward).parameters)
    windows = _windows(config, len(module.get_submodule(blocks)))
    outer = {part for part, _ in decoder.named_children()}
    norm = next((name for name in _FINAL_NORM if name in outer), None)
    block_run = run_block(
        module, block, device=input_device(module), weightless=is_weightless(module), name=name
    )
    return Architecture(
        blocks=blocks,
        parts=_parts(block, block_run.widths, config.hidden_size),
        final_norm=f"{inside}{norm}" if norm else None,
        unembed=paths[id(unembed)],
        arguments=tuple(inspect.signature(module.forward).parameters),
        block_arguments=block_arguments,
        windows=windows or (),
        packs=windows is not None and _packs(module, block_arguments) and block_run.output_type is not None,
        gives_tuples=block_run.output_type is tuple,
        attends=block_run.attends,
        kept=block_run.kept,
        # Gemma 4's "vision" concerns only images.
        causal=setting(config, "use_bidirectional_attention") in (None, False, "vision"),
        stretches=_stretches(config),
    )


def _parts(block: Any, widths: Mapping[str, tuple[int, int]], d_model: int) -> tuple[Part, ...]:
    """List the modules inside a block. Modules of unknown width are assumed to have the width of the block.

    Lists of modules are left out: they are not called, so they have no output.
    """
    from torch.nn import ModuleList

    return tuple(
        Part(path, *widths.get(path, (d_model, d_model)))
        for path, part in block.named_modules()
        if path and not isinstance(part, ModuleList)
    )


def _find_blocks(module: Any, inside: str) -> str | None:
    """Find the path of the decoder blocks: the list with the config's depth, otherwise with most weights.

    In some families the result of `get_decoder`, at the path `inside`, is not the decoder.
    """
    from torch.nn import ModuleList

    lists = {
        path: part for path, part in module.named_modules() if isinstance(part, ModuleList) and len(part)
    }
    within = {path: part for path, part in lists.items() if path.startswith(inside)} or lists
    depth = setting(module.config.get_text_config(), "num_hidden_layers")
    as_deep = [path for path, part in within.items() if len(part) == depth]
    if as_deep:
        return min(as_deep, key=len)
    weights = {path: sum(w.numel() for w in part.parameters()) for path, part in within.items()}
    return max(weights, key=lambda path: weights[path], default=None)


#: The arguments that a block may take for packing, which separates tokens only by mask and position.
_PACKABLE = {
    *("self", "hidden_states", "attention_mask", "position_ids", "position_embeddings", "cache_position"),
    *("past_key_values", "layer_past", "use_cache", "output_attentions", "kwargs"),
    *("encoder_hidden_states", "encoder_attention_mask"),
}


def _windows(config: Any, count: int) -> tuple[int | None, ...] | None:
    """Return each block's attention window, None for full attention; None if a block has another kind."""
    window = setting(config, "sliding_window")
    kinds = setting(config, "layer_types")
    if kinds is None:
        return (window,) * count
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _packs(module: Any, arguments: tuple[str, ...]) -> bool:
    masked = "attention_mask" in arguments and module.config._attn_implementation in ("sdpa", "eager")  # noqa: SLF001 (transformers' own name for it)
    cached = {"past_key_values", "layer_past"} & set(arguments)
    return bool(masked and cached and not set(arguments) - _PACKABLE)


def output_embeddings(module: Any) -> Any:
    """Return the linear map to the vocabulary; None if there is none."""
    named = (part for path, part in module.named_modules() if path.rpartition(".")[2] == "lm_head")
    return module.get_output_embeddings() or next(named, None)


def input_device(module: Any) -> Any:
    """Return the device of a model's input tokens; the CPU if the embedding's weights are offloaded."""
    weight = weight_of(module.get_input_embeddings())
    device = module.device if weight is None else weight.device
    return "cpu" if device.type == "meta" and not is_weightless(module) else device


def is_offloaded(module: Any) -> bool:
    """True if accelerate keeps a model's weights in memory or on disk, and loads them when needed."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def is_weightless(module: Any) -> bool:
    """True if a model has only its structure: every weight is on the meta device, and none is offloaded."""
    return not is_offloaded(module) and all(weight.device.type == "meta" for weight in module.parameters())


def unembed(module: Any, architecture: Architecture, states: Any) -> Any:
    """Compute logits from states of the last block, with the model's final norm and unembedding.

    The states are (..., d_model), and the logits (..., vocab_size), scaled and capped as in the model's own
    forward.
    """
    if architecture.final_norm is not None:
        states = module.get_submodule(architecture.final_norm)(states)
    logits = module.get_submodule(architecture.unembed)(states)
    config = module.config.get_text_config()
    # Cohere multiplies, Granite divides, Gemma 2 caps.
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


def check_unembed(module: Any, architecture: Architecture, *, name: str) -> None:
    """Check on three tokens that `unembed` of the last block's output equals the model's own logits.

    Raises:
        ModelError: The model computes its logits differently.
    """
    import torch

    outputs: list[Any] = []
    last = module.get_submodule(architecture.blocks)[-1]
    keeping = last.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad(), keeping:
        ids = torch.tensor([[1, 2, 3]], device=input_device(module))
        logits = module(input_ids=ids, use_cache=False).logits
        with suppress(RuntimeError):  # the shapes do not fit
            ours = unembed(module, architecture, states_of(outputs[0]))
            if ours.shape == logits.shape and torch.allclose(ours, logits, rtol=1e-2, atol=1e-2):
                return
    raise ModelError(
        f"{name!r} ({type(module).__name__}) computes its logits from its last block's output in an unknown "
        f"way: {architecture.final_norm or 'no norm'}, then {architecture.unembed}, results in other logits.",
        hint="Please report the architecture; patchscope_nn/models/architecture.py is where it belongs.",
    )


def measure(module: Any, architecture: Architecture) -> Sizes:
    """Measure a model's parts."""
    block = module.get_submodule(architecture.blocks)[0]
    unembed_weights = sum(map(math.prod, _shapes(output_embeddings(module))))
    config = module.config.get_text_config()
    return sizes_of(config, _shapes(block), unembed_weights=unembed_weights, kept=architecture.kept)


def sizes_of(config: Any, shapes: list[tuple[int, ...]], *, unembed_weights: int, kept: int = 0) -> Sizes:
    """Return the sizes of a model's parts.

    Args:
        config: The config of its decoder.
        shapes: The shapes of the linear maps of a block.
        unembed_weights: The number of weights in the unembedding.
        kept: The number of values a block caches for a token; 0 computes it from the config.
    """
    heads = setting(config, "num_attention_heads") or 1
    of_head = setting(config, "head_dim") or config.hidden_size // heads
    groups = setting(config, "num_key_value_heads") or heads
    return Sizes(
        block_weights=sum(map(math.prod, shapes)),
        unembed_weights=unembed_weights,
        attention=heads * of_head,
        cache=kept or 2 * groups * of_head,
        widest=max((max(shape) for shape in shapes), default=config.hidden_size),
    )


def setting(config: Any, name: str) -> Any:
    """Return a setting of a config, or None; if it differs between blocks, that of the first block."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # raised by transformers if the setting differs between blocks
        return getattr(config.per_layer_config[0], name, None)


def longest_prompt(config: Any) -> int | None:
    """Return the maximum number of tokens in a model's config; None if there is no limit."""
    most = setting(config, "max_position_embeddings")
    return most if isinstance(most, int) and most > 0 else None


def _stretches(config: Any) -> bool:
    rotary = setting(config, "rope_parameters")
    # A model with several kinds of attention has the parameters of each.
    kinds = [rotary, *rotary.values()] if isinstance(rotary, dict) else []
    return any(isinstance(kind, dict) and kind.get("rope_type") == "dynamic" for kind in kinds)


def _shapes(module: Any) -> list[tuple[int, ...]]:
    """List the shapes of a module's linear maps, also of quantised ones, whose weights are packed."""
    shapes: list[tuple[int, ...]] = []
    for part in module.modules():
        size_in, size_out = getattr(part, "in_features", None), getattr(part, "out_features", None)
        if hasattr(part, "base_layer"):  # a wrapper of peft, whose parts are counted
            continue
        if isinstance(size_in, int) and isinstance(size_out, int):
            shapes.append((size_out, size_in))
        else:
            shapes += [tuple(weight.shape) for weight in part.parameters(recurse=False) if weight.ndim > 1]
    return shapes


def weight_of(part: Any) -> Any:
    """Return the weight of an embedding or an unembedding; None if it is packed (quantised)."""
    from torch import Tensor

    weight = getattr(part, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def dtype_of(module: Any) -> str:
    """Return the dtype a model computes in: that of its embedding, or if that is packed, the model's own."""
    weight = weight_of(module.get_input_embeddings())
    dtype = weight.dtype if weight is not None and weight.is_floating_point() else module.dtype
    return str(dtype).removeprefix("torch.")


def refuse_shared_scales(module: Any, *, name: str) -> None:
    """Refuse a model whose activations are quantised with one scale for all tokens of a pass."""
    for path, part in module.named_modules():
        if ".quantized.dynamic" in type(part).__module__:
            raise ModelError(
                f"{name!r} is quantised by torch.ao.quantization.quantize_dynamic ({path}): activations are "
                "rounded with one scale for all tokens of a pass, so that a token's state depends on the "
                "tokens after it and on the other prompts of its batch.",
                hint="Use the unquantised model, or quantise only its weights (bitsandbytes, torchao).",
            )
