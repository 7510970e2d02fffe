"""Where a model keeps its parts, and how large they are. Every branch on an architecture is in this file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from patchscope_nn.errors import ModelError
from patchscope_nn.models.block import run_block, states_of
from patchscope_nn.models.info import Architecture, Part, Sizes

#: What models call their final norm, for which transformers has no interface. What blocks call their parts
#: stands in `spec/sites.py`.
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


def find_architecture(module: Any, *, name: str) -> Architecture:
    """Find a model's parts.

    Args:
        module: The transformers model.
        name: Its name, for messages.

    Returns:
        The paths of its parts.

    Raises:
        ModelError: The blocks or the unembedding are not to be found.
    """
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
    if "reference_sliding_attention" in (setting(module.config.get_text_config(), "layer_types") or ()):
        raise ModelError(
            f"{name!r} ({type(module).__name__}): a decoded token sees all of the prompt, but only "
            "the latest decoded ones. It is read in one way in a prompt, and in another when it is decoded.",
            hint="Use a model whose windows are the same for both.",
        )
    block = module.get_submodule(blocks)[0]
    block_arguments = tuple(inspect.signature(block.forward).parameters)
    windows = _windows(module.config.get_text_config(), len(module.get_submodule(blocks)))
    outer = {part for part, _ in decoder.named_children()}
    norm = next((name for name in _FINAL_NORM if name in outer), None)
    block_run = run_block(
        module, block, device=input_device(module), weightless=is_weightless(module), name=name
    )
    return Architecture(
        blocks=blocks,
        parts=_parts(block, block_run.widths, module.config.get_text_config().hidden_size),
        final_norm=f"{inside}{norm}" if norm else None,
        embed=paths[id(module.get_input_embeddings())],
        unembed=paths[id(unembed)],
        arguments=tuple(inspect.signature(module.forward).parameters),
        block_arguments=block_arguments,
        windows=windows or (),
        packs=windows is not None and _packs(module, block_arguments) and block_run.gives is not None,
        gives_tuples=block_run.gives is tuple,
        attends=block_run.attends,
        kept=block_run.kept,
        # Gemma 4's "vision" is of images alone.
        causal=setting(module.config.get_text_config(), "use_bidirectional_attention")
        in (None, False, "vision"),
        stretches=_stretches(module.config.get_text_config()),
    )


def _parts(block: Any, widths: Mapping[str, tuple[int, int]], d_model: int) -> tuple[Part, ...]:
    """The modules inside a block; one whose widths were not seen is taken to be as wide as the block.

    A list of modules is not called itself, so it has no output.
    """
    from torch.nn import ModuleList

    return tuple(
        Part(path, *widths.get(path, (d_model, d_model)))
        for path, part in block.named_modules()
        if path and not isinstance(part, ModuleList)
    )


def _find_blocks(module: Any, inside: str) -> str | None:
    """The path of the decoder blocks: the list as long as the config's depth, or else the heaviest list.

    Args:
        module: The transformers model.
        inside: The path of what its `get_decoder` gives, which in some families is not the decoder.
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


#: What a block may be given for its tokens to be told apart by a mask and their positions alone.
_PACKABLE = {
    *("self", "hidden_states", "attention_mask", "position_ids", "position_embeddings", "cache_position"),
    *("past_key_values", "layer_past", "use_cache", "output_attentions", "kwargs"),
    *("encoder_hidden_states", "encoder_attention_mask"),
}


def _windows(config: Any, count: int) -> tuple[int | None, ...] | None:
    """How many tokens back each of so many blocks sees; None where it is not all or a sliding window."""
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
    """The linear map to the vocabulary; None where there is none."""
    named = (part for path, part in module.named_modules() if path.rpartition(".")[2] == "lm_head")
    return module.get_output_embeddings() or next(named, None)


def input_device(module: Any) -> Any:
    """The device a model takes its tokens on; weights that are offloaded have none of their own."""
    weight = weight_of(module.get_input_embeddings())
    device = module.device if weight is None else weight.device
    return "cpu" if device.type == "meta" and not is_weightless(module) else device


def is_offloaded(module: Any) -> bool:
    """Whether accelerate moves a model's weights to where they are needed, from memory or disk."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def is_weightless(module: Any) -> bool:
    """Whether a model is only its structure: every weight on the meta device, and none offloaded."""
    return not is_offloaded(module) and all(weight.device.type == "meta" for weight in module.parameters())


def unembed(module: Any, architecture: Architecture, states: Any) -> Any:
    """The logits a model makes of the output of its last block: its final norm and its unembedding.

    Args:
        module: The transformers model.
        architecture: The paths of its parts.
        states: (..., d_model) hidden states.

    Returns:
        (..., vocab_size) logits, scaled and capped as the model's own forward does it.
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
    """Make sure, on three tokens, that `unembed` of the last block's output gives the model's own logits.

    Args:
        module: The transformers model, with its weights.
        architecture: The paths of its parts.
        name: Its name, for messages.

    Raises:
        ModelError: It does more, or other, between its last block and its logits.
    """
    import torch

    found: list[Any] = []
    last = module.get_submodule(architecture.blocks)[-1]
    handle = last.register_forward_hook(lambda _module, _given, output: found.append(output))
    try:
        with torch.no_grad():
            ids = torch.tensor([[1, 2, 3]], device=input_device(module))
            logits = module(input_ids=ids, use_cache=False).logits
            states = states_of(found[0])
            with suppress(RuntimeError):  # shapes that do not fit
                ours = unembed(module, architecture, states)
                if ours.shape == logits.shape and torch.allclose(ours, logits, rtol=1e-2, atol=1e-2):
                    return
    finally:
        handle.remove()
    raise ModelError(
        f"{name!r} ({type(module).__name__}) makes its logits of its last block's output in a way that is "
        f"not known here: {architecture.final_norm or 'no norm'}, then {architecture.unembed}, gives others.",
        hint="Please report the architecture; patchscope_nn/models/architecture.py is where it belongs.",
    )


def measure(module: Any, architecture: Architecture) -> Sizes:
    """How large a model's parts are.

    Args:
        module: The transformers model.
        architecture: The paths of its parts.
    """
    block = module.get_submodule(architecture.blocks)[0]
    config = module.config.get_text_config()
    heads = setting(config, "num_attention_heads") or 1
    of_head = setting(config, "head_dim") or config.hidden_size // heads
    groups = setting(config, "num_key_value_heads") or heads
    shapes = _shapes(block)
    return Sizes(
        block_weights=sum(map(math.prod, shapes)),
        unembed_weights=sum(map(math.prod, _shapes(output_embeddings(module)))),
        attention=heads * of_head,
        cache=architecture.kept or 2 * groups * of_head,
        widest=max((max(shape) for shape in shapes), default=config.hidden_size),
    )


def setting(config: Any, name: str) -> Any:
    """A setting of a config, or None; where blocks differ in it, that of the first."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers': this setting differs between blocks
        return getattr(config.per_layer_config[0], name, None)


def longest_prompt(config: Any) -> int | None:
    """The most tokens that a model reads, as its config says; None where it sets no limit."""
    most = setting(config, "max_position_embeddings")
    return most if isinstance(most, int) and most > 0 else None


def _stretches(config: Any) -> bool:
    rotary = setting(config, "rope_parameters")
    given = rotary if isinstance(rotary, dict) else {}
    kinds = [given, *(kind for kind in given.values() if isinstance(kind, dict))]
    return any(kind.get("rope_type") == "dynamic" for kind in kinds)


def _shapes(module: Any) -> list[tuple[int, ...]]:
    """The shapes of a module's linear maps; a quantised weight is packed, and has another shape."""
    shapes: list[tuple[int, ...]] = []
    for part in module.modules():
        size_in, size_out = getattr(part, "in_features", None), getattr(part, "out_features", None)
        if hasattr(part, "base_layer"):  # peft's: its parts are counted
            continue
        if isinstance(size_in, int) and isinstance(size_out, int):
            shapes.append((size_out, size_in))
        else:
            shapes += [tuple(weight.shape) for weight in part.parameters(recurse=False) if weight.ndim > 1]
    return shapes


def weight_of(part: Any) -> Any:
    """The weight of an embedding or of an unembedding; None where it is packed away."""
    from torch import Tensor

    weight = getattr(part, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def dtype_of(module: Any) -> str:
    """The dtype that a model computes in: that of its embeddings, or where these are packed, its own."""
    weight = weight_of(module.get_input_embeddings())
    dtype = weight.dtype if weight is not None and weight.is_floating_point() else module.dtype
    return str(dtype).removeprefix("torch.")


def refuse_shared_scales(module: Any, *, name: str) -> None:
    """Refuse a model in which the tokens of a pass change each other's states.

    Args:
        module: The transformers model.
        name: Its name, for messages.

    Raises:
        ModelError: Its activations are quantised with a scale that is taken over all tokens of a pass.
    """
    for path, part in module.named_modules():
        if ".quantized.dynamic" in type(part).__module__:
            raise ModelError(
                f"{name!r} is quantised by torch.ao.quantization.quantize_dynamic ({path}): activations are "
                "rounded with one scale for all tokens of a pass, so that a token's state depends on the "
                "tokens after it and on the other prompts of its batch.",
                hint="Use the model as it was before, or quantise its weights alone (bitsandbytes, torchao).",
            )
