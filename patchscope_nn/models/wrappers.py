"""Models inside something else: compiled, or with adapters of peft; and folders that hold only an adapter."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from patchscope_nn.errors import ModelError


def unwrapped(model: Any) -> Any:
    """The model that `torch.compile` or peft wraps, with the adapters that peft put into it.

    Args:
        model: Anything.

    Returns:
        The innermost model; what is not wrapped, as it is.

    Raises:
        ModelError: The wrapper does more than to change weights, as learned prompts do; or parts of the model
            are compiled.
    """
    peft = sys.modules.get("peft")  # a model that peft wraps has loaded it
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # noqa: SLF001 (torch has no public name for it)
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
                "inside compiled code no state can be read or written.",
                hint="Give the model as it is before .compile() is called, or torch.compile(model).",
            )


def _check_same(wrapper: Any, inner: Any, *, kind: str) -> None:
    """Make sure, on three tokens, that a model with its adapters is all that peft's wrapper runs."""
    import torch

    training = wrapper.training
    wrapper.eval()
    try:
        ids = torch.tensor([[1, 2, 3]], device=inner.device)
        with torch.no_grad():
            expected, logits = (module(input_ids=ids).logits for module in (wrapper, inner))
        same = expected.shape == logits.shape and torch.allclose(expected, logits, equal_nan=True)
    except (TypeError, ValueError, RuntimeError):  # it needs more than tokens
        same = False
    finally:
        wrapper.train(training)
    if not same:
        raise ModelError(
            f"a {type(wrapper).__name__} with {kind} does more than change its model's weights, and "
            "that is not traced.",
            hint="Give the model without it, or one with a LoRA adapter.",
        )


def adapters_of(module: Any) -> tuple[str, ...]:
    """The names of the adapters that peft put into a model and that are active."""
    layers = (
        part for part in module.modules() if hasattr(part, "base_layer") and hasattr(part, "active_adapters")
    )
    layer = next(layers, None)
    return () if layer is None or layer.disable_adapters else tuple(layer.active_adapters)


def adapter_base(place: str, *, revision: str | None = None) -> tuple[str, str | None] | None:
    """The model that an adapter is for, and its revision; None of what is no adapter.

    Args:
        place: A folder or a Hugging Face id.
        revision: The adapter's revision.

    Raises:
        ModelError: The adapter does not name its model.
    """
    from transformers.utils import find_adapter_config_file

    if Path(place, "config.json").is_file():  # a whole model, which transformers loads with its adapter
        return None
    file = None
    with suppress(OSError, ValueError):  # what is wrong with the name is said where it is loaded
        file = find_adapter_config_file(place, revision=revision)
    if file is None:
        return None
    try:
        asked = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}", hint="Save the adapter again.") from error
    base = asked.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"the adapter {place!r} does not name the model it is for.",
            hint="Write its id or folder as base_model_name_or_path into adapter_config.json.",
        )
    return base, asked.get("revision")


def adapter_tokenizer(place: str, *, revision: str | None = None) -> Any:
    """The tokenizer that is saved with an adapter; None where there is none."""
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError):
        return AutoTokenizer.from_pretrained(place, revision=revision)
    return None
