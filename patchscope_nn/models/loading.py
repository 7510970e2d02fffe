"""Loading and describing a model, or wrapping and describing a loaded one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from patchscope_nn.errors import ModelError, did_you_mean
from patchscope_nn.models import builtin
from patchscope_nn.models.architecture import (
    dtype_of,
    find_architecture,
    input_device,
    is_weightless,
    longest_prompt,
    measure,
    output_embeddings,
    refuse_shared_scales,
    weight_of,
)
from patchscope_nn.models.info import ELSEWHERE, TRANSFORMERS, VLLM, Model, ModelInfo
from patchscope_nn.models.turns import in_turn
from patchscope_nn.models.vllm import load_vllm
from patchscope_nn.models.wrappers import adapter_base, adapter_tokenizer, adapters_of, unwrapped

_TASK = "text-generation"
_DECODERS = "Use a causal language model, for example one of the Llama, GPT-2, Qwen or Gemma families."
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@in_turn
def load(
    model: Any,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    tokenizer: Any = None,
    weights: bool = True,
    engine: str = TRANSFORMERS,
    **options: Any,
) -> Model:
    """Load a decoder, or wrap one that is already loaded. `proof.load` documents the arguments.

    Raises:
        ModelError: The model cannot be found, is not a decoder, or its parts cannot be found; or `dtype` is
            not a valid dtype.
    """
    if engine not in (TRANSFORMERS, VLLM):
        raise ModelError(
            f"engine={engine!r} is not an engine.", hint=did_you_mean(engine, (TRANSFORMERS, VLLM))
        )
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ModelError(f"dtype={dtype!r} is not a valid dtype.", hint=did_you_mean(dtype, _DTYPES))
    if isinstance(model, Model):
        return model
    if not isinstance(model, str | Path):
        return _wrap(model, tokenizer, weights=weights)
    name = str(model)
    if engine == VLLM:
        options = {**options, "dtype": dtype, "revision": revision, "weights": weights}
        return load_vllm(name, _locate(name), **options)
    source, options = _locate(name), {**options, "revision": revision}
    from transformers import AutoConfig, AutoTokenizer

    with _explained(name), _quiet():
        if (base := adapter_base(source, revision=revision)) is not None:
            options = {"dtype": dtype, "device_map": device_map, "weights": weights, **options}
            return _load_adapter(name, base, tokenizer, options)
        auto = _auto_class(AutoConfig.from_pretrained(source, revision=revision), name)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, revision=revision)
        if not weights:
            return _describe(name, _structure(name, source, tokenizer, revision, auto), tokenizer)
        if device_map is not None:
            options["device_map"] = device_map
        module, report = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    _refuse_random_weights(module, report["missing_keys"], name)
    _refuse_no_decoder(module, name)
    return _describe(name, _traced(module, tokenizer), tokenizer)


def serve_vllm(name: str, **options: Any) -> Model:
    """Load a model with vLLM, to serve it; the options are those of `load_vllm`."""
    return load_vllm(name, _locate(name), mode="async", **options)


def _load_adapter(name: str, base: tuple[str, str | None], tokenizer: Any, options: dict[str, Any]) -> Model:
    """Load the model that an adapter is for, with the adapter merged into it."""
    from patchscope_nn.models.adapter import with_adapter  # which imports this module

    revision = options["revision"]
    tokenizer = tokenizer or adapter_tokenizer(name, revision=revision)
    model = load(base[0], **{**options, "revision": base[1]}, tokenizer=tokenizer)
    return with_adapter(model, name, name=name, revision=revision, tokenizer=model.tokenizer)


def _auto_class(config: Any, name: str) -> Any:
    """Return the transformers class that loads a checkpoint with its language modelling head."""
    import transformers
    from transformers.models.auto import modeling_auto

    if config.is_encoder_decoder:
        raise _no_decoder(name, config, "an encoder-decoder")
    custom = getattr(config, "auto_map", None) or {}
    for kind, known in (
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        if config.model_type in known or kind in custom:
            return getattr(transformers, kind)
    raise _no_decoder(name, config, "not a language model that transformers knows")


def _traced(module: Any, tokenizer: Any) -> Any:
    """Wrap a transformers model for nnsight, without its pipeline's long warnings about images."""
    from nnsight import TransformersModel
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        return TransformersModel(module, task=_TASK, tokenizer=tokenizer)
    finally:
        logging.set_verbosity(before)


def _structure(name: str, source: str, tokenizer: Any, revision: str | None, auto: Any) -> Any:
    """Return a model without its weights, which a server knows by its id on the Hub."""
    from nnsight import TransformersModel
    from transformers import GenerationConfig

    options: dict[str, Any] = {"task": _TASK}
    if auto.__name__ != "AutoModelForCausalLM":
        # Without this, an image processor would be loaded, which needs additional files and packages.
        options = {"task": "image-text-to-text", "processor": tokenizer}
    traced = TransformersModel(source, tokenizer=tokenizer, revision=revision, **options)
    with suppress(OSError):  # most models have one; it names the tokens that end a text
        traced._module.generation_config = GenerationConfig.from_pretrained(source, revision=revision)  # noqa: SLF001 (as in Model.module)
    if name == builtin.NAME:
        traced.repo_id = builtin.HUB_ID
    return traced


def _locate(name: str) -> str:
    """Return what transformers loads for a name: the builtin model's converted folder, or the name itself."""
    if not name.startswith("builtin:"):
        return name
    if name != builtin.NAME:
        raise ModelError(f"{name!r} is not a builtin model.", hint=f"The only one is {builtin.NAME!r}.")
    with _quiet():
        folder = builtin.folder()
    return builtin.HUB_ID if folder is None else str(folder)


def _wrap(model: Any, tokenizer: Any, *, weights: bool) -> Model:
    from nnsight import TransformersModel
    from transformers import AutoTokenizer, PreTrainedModel

    if isinstance(model, TransformersModel):
        if weights and not model.dispatched:
            model.dispatch()
        name = str(model.repo_id or model._module.config._name_or_path)  # noqa: SLF001 (its only name)
        return _describe(name, model, tokenizer or model.tokenizer)
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"a {type(model).__name__} is not a model that can be traced.",
            hint="Give a Hugging Face id, a folder, a transformers model or an nnsight TransformersModel.",
        )
    base = model.config._name_or_path or type(model).__name__  # noqa: SLF001 (transformers' own name for it)
    name = "+".join([base, *adapters_of(model)])
    _refuse_no_decoder(model, name)
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"the tokenizer of {base!r} was not found.", hint="Give it: load(model, tokenizer=...)."
            ) from error
    return _describe(name, _traced(model, tokenizer), tokenizer)


def _refuse_no_decoder(module: Any, name: str) -> None:
    """Refuse models that cannot continue a text: encoder-decoders, and models without an unembedding."""
    if module.config.is_encoder_decoder:
        raise _no_decoder(name, module.config, "an encoder-decoder")
    if output_embeddings(module) is None:
        raise ModelError(
            f"{name!r} ({type(module).__name__}) has no unembedding, so that nothing can be read from it.",
            hint="Load it with its language modelling head: AutoModelForCausalLM.",
        )


def _refuse_random_weights(module: Any, missing: Collection[str], name: str) -> None:
    """Refuse a checkpoint that lacks weights of the model, which transformers initialises at random."""
    if missing:
        names = ", ".join(sorted(missing)[:3]) + ", ..." * (len(missing) > 3)  # noqa: PLR2004 (three are named)
        raise ModelError(
            f"{name!r} lacks weights of a {type(module).__name__}, which would be random: {names}.",
            hint="Use a checkpoint that was saved with its language modelling head. If you want random "
            "weights, load the model with transformers and pass the model itself.",
        )


def _no_decoder(name: str, config: Any, kind: str) -> ModelError:
    return ModelError(
        f"{name!r} ({config.model_type}) is {kind}; a Patchscope needs a decoder.", hint=_DECODERS
    )


def _describe(name: str, traced: Any, tokenizer: Any) -> Model:
    module = traced._module  # noqa: SLF001 (as in Model.module)
    config = module.config.get_text_config()
    for field in ("hidden_size", "vocab_size"):
        if not isinstance(getattr(config, field, None), int):
            raise ModelError(
                f"{name!r} ({type(module).__name__}) is not a decoder of tokens: its config has no {field}.",
                hint=_DECODERS,
            )
    unembed, embed = output_embeddings(module), module.get_input_embeddings()
    refuse_shared_scales(module, name=name)
    architecture = find_architecture(module, name=name)
    weightless = is_weightless(module)
    if getattr(config, "is_decoder", True) is False and not weightless:
        _refuse_looking_ahead(module, name)
    info = ModelInfo(
        name=name,
        revision=getattr(module.config, "_commit_hash", None),
        family=module.config.model_type,
        n_layers=len(module.get_submodule(architecture.blocks)),
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        n_positions=longest_prompt(config),
        dtype=dtype_of(module),
        device=ELSEWHERE if weightless else str(input_device(module)),
        tied=weight_of(embed) is not None and weight_of(embed) is weight_of(unembed),
        architecture=architecture,
        sizes=measure(module, architecture),
    )
    return Model(info=info, tokenizer=tokenizer, traced=traced)


def _refuse_looking_ahead(module: Any, name: str) -> None:
    """Refuse encoders that load as language models: a decoder's logits have no gradient from later tokens."""
    import torch

    embedded: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    with torch.enable_grad(), module.get_input_embeddings().register_forward_hook(keep):
        logits = module(input_ids=torch.tensor([[1, 2, 3]], device=input_device(module))).logits
        (gradient,) = torch.autograd.grad(logits[0, 0].float().sum(), embedded)
    if gradient[0, 1:].any():
        raise ModelError(
            f"{name!r} ({type(module).__name__}) is an encoder: its tokens attend to later tokens.",
            hint="Use a causal language model.",
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """While active, convert errors of loading to a `ModelError` with a hint."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1 if "original errors" in lines[0] else 0]  # there, transformers puts the reason last
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
    """While active, hide transformers' progress bars and its reports of unused weights."""
    from transformers.utils import logging

    def is_other(record: Any) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    had_bar, logger = logging.is_progress_bar_enabled(), logging.get_logger("transformers.modeling_utils")
    logging.disable_progress_bar()
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
        if had_bar:
            logging.enable_progress_bar()
