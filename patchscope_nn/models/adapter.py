"""A model that wears a LoRA adapter: an oracle trained to answer questions about states, for example."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from patchscope_nn.errors import ModelError
from patchscope_nn.models.info import ELSEWHERE, Model
from patchscope_nn.models.loading import load
from patchscope_nn.models.turns import in_turn
from patchscope_nn.models.wrappers import adapter_base, adapter_tokenizer


@in_turn
def wear(
    model: Model, adapter: str, *, name: str | None = None, revision: str | None = None, tokenizer: Any = None
) -> Model:
    """A model with an adapter's weights merged into it.

    The matrices that the adapter leaves alone are shared with the first model, which is left as it is.

    Args:
        model: The model the adapter was trained for.
        adapter: A folder or a Hugging Face id of a peft adapter.
        name: The new model's name; None is `MODEL+ADAPTER`.
        revision: The adapter's revision.
        tokenizer: The new model's tokenizer; None is the one that is saved with the adapter, or else the
            first model's.

    Returns:
        Another model.

    Raises:
        ModelError: The model's weights are on a server, peft is not installed, or the adapter does not fit.
    """
    name = name or f"{model.info.name}+{adapter}"
    if model.info.device == ELSEWHERE:
        raise ModelError(
            f"the adapter {adapter} would be merged into weights that are on a server.",
            hint="Have the merged model deployed there, and name that.",
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
            warnings.simplefilter("ignore", FutureWarning)  # peft's, of names in transformers
            wrapper = PeftModel.from_pretrained(_sharing_copy(model.module), adapter, revision=revision)
            # Merged into fewer bits, an adapter would be rounded away.
            quantised = getattr(model.module, "is_quantized", False)
            # A safe merge makes new matrices; the other would change those that are shared.
            worn = wrapper.get_base_model() if quantised else wrapper.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the adapter {adapter} cannot be put on {model.info.name}: {reason}",
            hint="Give a folder or id with adapter_config.json and its weights, made for this model.",
        ) from error
    tokenizer = tokenizer or adapter_tokenizer(adapter, revision=revision) or model.tokenizer
    loaded = load(worn, tokenizer=tokenizer)
    return replace(loaded, info=replace(loaded.info, name=name))


def common_base(first: Any, second: Any) -> Any:
    """The model to load once for two that are asked for, one of them an adapter, or both.

    Args:
        first: What `load` takes.
        second: The same.

    Returns:
        What `load` takes; None where neither is an adapter, or they are made for different models.
    """
    models = (first, second)
    bases = [_base_of(model) for model in models]
    roots = [
        base or (model.info.name if isinstance(model, Model) else str(model))
        for base, model in zip(bases, models, strict=True)
    ]
    if roots[0] != roots[1] or not any(bases):
        return None
    return next((model for base, model in zip(bases, models, strict=True) if base is None), roots[0])


def wear_named(model: Model, asked: Any) -> Model:
    """A model itself, or where an adapter is asked for, the model with it."""
    return model if _base_of(asked) is None else wear(model, str(asked), name=str(asked))


def _base_of(asked: Any) -> str | None:
    base = adapter_base(str(asked)) if isinstance(asked, str | Path) else None
    return base and base[0]


def _sharing_copy(module: Any) -> Any:
    """A copy of a model that shares its matrices; vectors are copied, since adapters load biases in place."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.ndim > 1]
    return copy.deepcopy(module, {id(tensor): copy.copy(tensor) for tensor in tensors})
