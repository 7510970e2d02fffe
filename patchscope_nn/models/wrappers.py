"""Unwrapping models that are compiled or have peft adapters, and reading folders with only an adapter."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from patchscope_nn.errors import ModelError


def unwrapped(model: Any) -> Any:
    """Return the model inside wrappers of `torch.compile` and peft, with the adapters that peft put into it.

    An object that is not wrapped is returned unchanged.

    Raises:
        ModelError: The wrapper does more than change weights, as learned prompts do; or parts of the model
            are compiled.
    """
    peft = sys.modules.get("peft")  # it is loaded if peft wraps the model
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # noqa: SLF001 (torch has no public attribute for it)
        elif peft is not None and isinstance(model, peft.PeftModel):
            inner = model.get_base_model()
            _check_same(model, inner, kind=str(model.peft_type).removeprefix("PeftType."))
            model = inner
        else:
            _refuse_compiled_parts(model)
            return model


def _refuse_compiled_parts(model: Any) -> None:
    for path, part in model.named_modules() if hasattr(model, "named_modules") else ():
        if getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod"):
            raise ModelError(
                f"{f'the part {path} of ' * bool(path)}this {type(model).__name__} is compiled in place, and "
                "states inside compiled code cannot be read or written.",
                hint="Give the model before .compile() is called, or give torch.compile(model).",
            )


def _check_same(wrapper: Any, inner: Any, *, kind: str) -> None:
    """Check on three tokens that peft's wrapper computes the same as the model with its adapters."""
    import torch

    training = wrapper.training
    wrapper.eval()
    try:
        ids = torch.tensor([[1, 2, 3]], device=inner.device)
        with torch.no_grad():
            expected, logits = wrapper(input_ids=ids).logits, inner(input_ids=ids).logits
        same = expected.shape == logits.shape and torch.allclose(expected, logits, equal_nan=True)
    except (TypeError, ValueError, RuntimeError):  # the wrapper needs other inputs than tokens
        same = False
    finally:
        wrapper.train(training)
    if not same:
        raise ModelError(
            f"a {type(wrapper).__name__} with {kind} does more than change its model's weights, which cannot "
            "be traced.",
            hint="Give the model without it, or one with a LoRA adapter.",
        )


def adapters_of(module: Any) -> tuple[str, ...]:
    """List the names of a model's active peft adapters."""
    for part in module.modules():
        if hasattr(part, "base_layer") and hasattr(part, "active_adapters"):
            return () if part.disable_adapters else tuple(part.active_adapters)
    return ()


def adapter_base(place: str, *, revision: str | None = None) -> tuple[str, str | None] | None:
    """Return the model that an adapter is for, and its revision; None if `place` is not an adapter.

    Args:
        place: A folder or a Hugging Face id.
        revision: The adapter's revision.

    Raises:
        ModelError: The adapter does not name its model.
    """
    from transformers.utils import find_adapter_config_file

    if Path(place, "config.json").is_file():  # a complete model, which transformers loads with its adapter
        return None
    file = None
    with suppress(OSError, ValueError):  # loading reports a wrong name later
        file = find_adapter_config_file(place, revision=revision)
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}", hint="Save the adapter again.") from error
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"the adapter {place!r} does not name the model it is for.",
            hint="Write its id or folder as base_model_name_or_path into adapter_config.json.",
        )
    return base, config.get("revision")


def adapter_tokenizer(place: str, *, revision: str | None = None) -> Any:
    """Return the tokenizer that is saved with an adapter; None if there is none."""
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError):
        return AutoTokenizer.from_pretrained(place, revision=revision)
    return None
