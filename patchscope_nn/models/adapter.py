"""Models with a LoRA adapter, for example an oracle that was trained to answer questions about states."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from patchscope_nn.errors import ModelError
from patchscope_nn.models.info import Model
from patchscope_nn.models.loading import load
from patchscope_nn.models.turns import in_turn
from patchscope_nn.models.wrappers import adapter_base, adapter_tokenizer


@in_turn
def with_adapter(
    model: Model, adapter: str, *, name: str | None = None, revision: str | None = None, tokenizer: Any = None
) -> Model:
    """Return a new model with an adapter's weights merged into it.

    The given model is not changed. Both share the matrices that the adapter does not change.

    Args:
        model: The model the adapter was trained for.
        adapter: A folder or a Hugging Face id of a peft adapter.
        name: The new model's name; None is `MODEL+ADAPTER`.
        revision: The adapter's revision.
        tokenizer: The new model's; None takes the adapter's, or if it has none, that of `model`.

    Raises:
        ModelError: The model's weights are not in this process, peft is not installed, or the adapter does
            not fit.
    """
    name = name or f"{model.info.name}+{adapter}"
    if not model.info.weights_here:
        raise ModelError(
            f"the adapter {adapter} would be merged into weights that are not in this process.",
            hint="Merge and save it with the engine transformers, and name the merged model.",
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"the adapter {adapter} needs peft, which is not installed.",
            hint="pip install 'patchscope-nn[oracle]'",
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, about names in transformers
            wrapper = PeftModel.from_pretrained(_sharing_copy(model.module), adapter, revision=revision)
            # Merging into quantised weights would round the adapter away, so it stays separate.
            quantised = getattr(model.module, "is_quantized", False)
            # A safe merge makes new matrices; an ordinary one would change the shared ones.
            adapted = wrapper.get_base_model() if quantised else wrapper.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the adapter {adapter} cannot be added to {model.info.name}: {reason}",
            hint="Give a folder or id with adapter_config.json and its weights, made for this model.",
        ) from error
    tokenizer = tokenizer or adapter_tokenizer(adapter, revision=revision) or model.tokenizer
    loaded = load(adapted, tokenizer=tokenizer)
    return replace(loaded, info=replace(loaded.info, name=name))


def common_base(first: Any, second: Any) -> Any:
    """Return the base model that two models share, so that it is loaded only once.

    All three are given as `load` takes them. None if neither is an adapter, or if their bases differ.
    """
    models = (first, second)
    bases = [_base_of(model) for model in models]
    names = [model.info.name if isinstance(model, Model) else str(model) for model in models]
    roots = {base or name for base, name in zip(bases, names, strict=True)}
    if len(roots) > 1 or not any(bases):
        return None
    return next((model for base, model in zip(bases, models, strict=True) if base is None), roots.pop())


def with_named_adapter(model: Model, name: Any) -> Model:
    """Return the model with the adapter that `name` refers to; if it is not an adapter, the model itself."""
    return model if _base_of(name) is None else with_adapter(model, str(name), name=str(name))


def _base_of(name: Any) -> str | None:
    base = adapter_base(str(name)) if isinstance(name, str | Path) else None
    return base and base[0]


def _sharing_copy(module: Any) -> Any:
    """Copy a model, sharing its matrices. Vectors are copied, because adapters load biases in place."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.ndim > 1]
    return copy.deepcopy(module, {id(tensor): copy.copy(tensor) for tensor in tensors})
