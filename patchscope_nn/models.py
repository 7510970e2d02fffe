"""Models: load one, describe it, and find its parts. The one place that knows architectures.

Parts are found through transformers' own interfaces (`get_decoder`, `get_input_embeddings`,
`get_output_embeddings`, the config's depth); what those do not name is found by the names below.
Everything else in the package addresses a part by its path, a plain string.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscope_nn import builtin
from patchscope_nn.errors import ModelError

_TASK = "text-generation"
#: What blocks call their parts, where transformers has no interface for it. OPT's MLP is two linear
#: layers in the block itself, of which the second gives the MLP's output.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a model keeps its parts, as dotted module paths.

    Attributes:
        blocks: The list of decoder blocks.
        attention: The attention module, inside a block; None where blocks have none.
        mlp: The MLP, inside a block; None where blocks have none.
        final_norm: The norm between the last block and the unembedding; None where there is none.
        embed: The token embedding.
        unembed: The linear map to the vocabulary.
        arguments: The names the model's forward takes.
        block_arguments: The names a block's forward takes, in order.
        windows: For each block how many tokens back its attention sees; None for all.
        packs: Whether blocks can be run one by one on segments of a sequence (see `layout.py`).
    """

    blocks: str
    attention: str | None
    mlp: str | None
    final_norm: str | None
    embed: str
    unembed: str
    arguments: tuple[str, ...]
    block_arguments: tuple[str, ...] = ()
    windows: tuple[int | None, ...] = ()
    packs: bool = False

    @property
    def caches(self) -> bool:
        """Whether a forward can go on from an earlier one's keys and values."""
        return "past_key_values" in self.arguments


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What planning needs to know of a model; nothing here holds a weight.

    Attributes:
        name: The id, folder or `builtin:` name it was loaded by.
        revision: The commit of a Hub model, where known.
        family: transformers' `model_type`.
        n_layers: The number of decoder blocks.
        d_model: The size of a hidden state.
        vocab_size: The number of logits.
        n_positions: The longest prompt, in tokens; None where the config sets no limit.
        dtype: The weights' dtype, for example `float32`.
        device: The device of the embedding.
        tied: Whether embedding and unembedding share their weights.
        architecture: Where the parts are.
    """

    name: str
    revision: str | None
    family: str
    n_layers: int
    d_model: int
    vocab_size: int
    n_positions: int | None
    dtype: str
    device: str
    tied: bool
    architecture: Architecture


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model ready to be traced.

    Attributes:
        info: What is known of it.
        tokenizer: Its transformers tokenizer.
        traced: The `nnsight.TransformersModel`.
    """

    info: ModelInfo
    tokenizer: Any
    traced: Any

    @property
    def module(self) -> Any:
        """The transformers model that nnsight wraps."""
        return self.traced._module  # noqa: SLF001 (nnsight has no public name for it)


def load(
    model: Any,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Model:
    """Load a decoder, or wrap one that is already loaded.

    Args:
        model: A Hugging Face id, a folder, `builtin:smollm2-135m-instruct`, an
            `nnsight.TransformersModel`, a transformers model, or a `Model` (returned as it is).
        revision: The Hub revision.
        dtype: A torch dtype or its name; `auto` keeps the checkpoint's own.
        device_map: Passed to transformers.
        tokenizer: The tokenizer; needed only for a transformers model whose own cannot be found.
        **options: Passed to transformers' `from_pretrained` (`quantization_config`,
            `attn_implementation`, ...).

    Returns:
        The model, its tokenizer, and what is known of it.

    Raises:
        ModelError: The model cannot be found, is no decoder, or hides its parts.
    """
    if isinstance(model, Model):
        return model
    if not isinstance(model, str | Path):
        return _wrap(model, tokenizer)
    name = str(model)
    place, options = _locate(name), {**options, "revision": revision}
    from nnsight import TransformersModel
    from transformers import AutoConfig, AutoTokenizer

    with _explained(name), _quiet():
        _refuse_no_decoder(AutoConfig.from_pretrained(place, revision=revision), name)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(place, revision=revision)
        if device_map is not None:
            options["device_map"] = device_map
        traced = TransformersModel(
            place, task=_TASK, tokenizer=tokenizer, dispatch=True, dtype=dtype, **options
        )
    return _describe(name, traced, tokenizer)


def _locate(name: str) -> str:
    """Where transformers finds a name: the converted folder of the builtin model, else the name."""
    if not name.startswith("builtin:"):
        return name
    if name != builtin.NAME:
        raise ModelError(f"{name!r} is no builtin model.", hint=f"The one there is: {builtin.NAME!r}.")
    with _quiet():
        folder = builtin.folder()
    return builtin.HUB_ID if folder is None else str(folder)


def _wrap(model: Any, tokenizer: Any) -> Model:
    from nnsight import TransformersModel
    from transformers import AutoTokenizer, PreTrainedModel

    if isinstance(model, TransformersModel):
        if not model.dispatched:
            model.dispatch()
        name = str(model.repo_id or model._module.config._name_or_path)  # noqa: SLF001 (its only name)
        return _describe(name, model, tokenizer or model.tokenizer)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"a {type(model).__name__} is no model we can trace.",
            hint="Give a Hugging Face id, a folder, a transformers model or an nnsight TransformersModel.",
        )
    name = model.config._name_or_path or type(model).__name__  # noqa: SLF001 (transformers' own name for it)
    _refuse_no_decoder(model.config, name)
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{name!r} ({type(model).__name__}) has no unembedding, so that nothing can be read from it.",
            hint="Load it with its language modelling head: AutoModelForCausalLM.",
        )
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"the tokenizer of {name!r} was not found.", hint="Give it: load(model, tokenizer=...)."
            ) from error
    return _describe(name, TransformersModel(model, task=_TASK, tokenizer=tokenizer), tokenizer)


def _refuse_no_decoder(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config.get_text_config()
    known = {config.model_type, text.model_type} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if config.is_encoder_decoder or not known:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "no language model transformers knows"
        raise ModelError(
            f"{name!r} ({config.model_type}) is {kind}; a Patchscope needs a decoder.",
            hint="Use a causal language model, for example one of the Llama, GPT-2, Qwen or Gemma families.",
        )


def _describe(name: str, traced: Any, tokenizer: Any) -> Model:
    module = traced._module  # noqa: SLF001 (as in Model.module)
    config = module.config.get_text_config()
    unembed, embed = module.get_output_embeddings(), module.get_input_embeddings()
    architecture = find_architecture(module, n_layers=config.num_hidden_layers, name=name)
    if getattr(config, "is_decoder", True) is False:
        _refuse_looking_ahead(module, name)
    info = ModelInfo(
        name=name,
        revision=getattr(module.config, "_commit_hash", None),
        family=module.config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        n_positions=getattr(config, "max_position_embeddings", None),
        dtype=str(embed.weight.dtype).removeprefix("torch."),
        device=str(embed.weight.device),
        tied=embed.weight is unembed.weight,
        architecture=architecture,
    )
    return Model(info=info, tokenizer=tokenizer, traced=traced)


def find_architecture(module: Any, *, n_layers: int, name: str) -> Architecture:
    """Find a model's parts.

    Args:
        module: The transformers model.
        n_layers: The number of its decoder blocks.
        name: Its name, for messages.

    Returns:
        The paths of its parts.

    Raises:
        ModelError: The blocks or the unembedding are not to be found.
    """
    from torch.nn import ModuleList

    paths = {id(part): path for path, part in module.named_modules()}
    decoder = module.get_decoder()
    inside = f"{paths[id(decoder)]}." if paths.get(id(decoder)) else ""
    lists = [
        path
        for path, part in module.named_modules()
        if isinstance(part, ModuleList) and len(part) == n_layers and path.startswith(inside)
    ]
    unembed = module.get_output_embeddings()
    if not lists or unembed is None:
        missing = "list of decoder blocks" if not lists else "unembedding"
        raise ModelError(
            f"{name!r} ({type(module).__name__}) has no {missing} that we can find.",
            hint="Please report the architecture; patchscope_nn/models.py is where it belongs.",
        )
    blocks = min(lists, key=len)
    block = module.get_submodule(blocks)[0]
    inner = {part for part, _ in block.named_children()}
    block_arguments = tuple(inspect.signature(block.forward).parameters)
    windows = _windows(module.config.get_text_config())
    outer = {part for part, _ in decoder.named_children()}
    norm = _first(_FINAL_NORM, outer)
    return Architecture(
        blocks=blocks,
        attention=_first(_ATTENTION, inner),
        mlp=_first(_MLP, inner),
        final_norm=f"{inside}{norm}" if norm else None,
        embed=paths[id(module.get_input_embeddings())],
        unembed=paths[id(unembed)],
        arguments=tuple(inspect.signature(module.forward).parameters),
        block_arguments=block_arguments,
        windows=windows or (None,) * n_layers,
        packs=windows is not None and _packs(module, block, block_arguments),
    )


#: What a block may be given for its tokens to be told apart by a mask and their positions alone.
_PACKABLE = {
    *("self", "hidden_states", "attention_mask", "position_ids", "position_embeddings", "cache_position"),
    *("past_key_values", "layer_past", "use_cache", "output_attentions", "kwargs"),
    *("encoder_hidden_states", "encoder_attention_mask"),
}


def _windows(config: Any) -> tuple[int | None, ...] | None:
    """For each block how many tokens back it sees; None where it is not all or a sliding window."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _packs(module: Any, block: Any, arguments: tuple[str, ...]) -> bool:
    masked = "attention_mask" in arguments and module.config._attn_implementation in ("sdpa", "eager")  # noqa: SLF001 (transformers' own name for it)
    if not masked or set(arguments) - _PACKABLE or not {"past_key_values", "layer_past"} & set(arguments):
        return False
    return _gives_tensor(module, block)


class _Seen(Exception):  # noqa: N818 (it is no error: it ends a forward that has shown what it should)
    """Raised by a hook."""


def _gives_tensor(module: Any, block: Any) -> bool:
    """Whether blocks give a bare tensor: run one token through the first of them."""
    import torch

    found = []

    def look(_module: Any, _given: Any, output: Any) -> None:
        found.append(output)
        raise _Seen

    handle = block.register_forward_hook(look)
    try:
        with torch.no_grad(), suppress(_Seen):
            module(input_ids=torch.ones(1, 1, dtype=torch.long, device=module.device), use_cache=False)
    finally:
        handle.remove()
    return bool(found) and isinstance(found[0], torch.Tensor)


def _first(names: tuple[str, ...], present: set[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _refuse_looking_ahead(module: Any, name: str) -> None:
    """Some encoders pass for language models; in a decoder a later token cannot change an earlier state."""
    import torch

    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=module.device)
    with torch.no_grad():
        first, second = module(input_ids=ids).logits[:, 0]
    if not torch.allclose(first, second, atol=1e-3):
        raise ModelError(
            f"{name!r} ({type(module).__name__}) is an encoder: its tokens see those after them.",
            hint="Use a causal language model.",
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what loading raises into one message that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ModelError(f"the model {name!r} could not be loaded: {reason}", hint=_hint(name)) from error


def _hint(name: str) -> str:
    if name.startswith("builtin:"):
        return f"Install its weights: {builtin.INSTALL}"
    if Path(name).exists() or name.startswith((".", "/", "~")):
        return "A model folder holds config.json, the weights and the tokenizer's files."
    return (
        f"Check the id, your connection and (for gated models) your token; or use {builtin.NAME!r}, "
        "which needs no Hub."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bars out of the terminal; ours is the one the user watches."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def same_vocabulary(first: Model, second: Model) -> bool:
    """Whether two models number their tokens alike, so that their distributions can be compared."""
    if first.tokenizer is second.tokenizer:
        return True
    return bool(first.tokenizer.get_vocab() == second.tokenizer.get_vocab())
