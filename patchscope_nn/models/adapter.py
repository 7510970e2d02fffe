"""A model that wears a LoRA adapter: an oracle trained to answer questions about states, for example."""

from __future__ import annotations

import copy
import warnings

from patchscope_nn.errors import ModelError
from patchscope_nn.models.info import ELSEWHERE, Model
from patchscope_nn.models.loading import load


def wear(model: Model, adapter: str) -> Model:
    """A model with an adapter's weights merged into a copy of its own.

    Args:
        model: The model the adapter was trained for.
        adapter: A folder or a Hugging Face id of a peft adapter.

    Returns:
        Another model, named `MODEL+ADAPTER`; the first is left as it is.

    Raises:
        ModelError: The model's weights are on a server, peft is not installed, or the adapter does not fit.
    """
    name = f"{model.info.name}+{adapter}"
    if model.info.device == ELSEWHERE:
        raise ModelError(
            f"target.adapter: {adapter} would be merged into weights that are on a server.",
            hint="Have the merged model deployed there, and name it as target.model.",
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            "target.adapter needs peft, which is not installed.", hint="pip install 'patchscope-nn[oracle]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, of names in transformers
            worn = PeftModel.from_pretrained(copy.deepcopy(model.module), adapter).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"target.adapter: {adapter} cannot be put on {model.info.name}: {reason}",
            hint="Give a folder or id with adapter_config.json and its weights, made for this model.",
        ) from error
    worn.config._name_or_path = name  # noqa: SLF001 (transformers' own name for a model)
    return load(worn, tokenizer=model.tokenizer)
