"""Builds a short model from a few blocks of another one whose blocks are all alike.

The compiler treats blocks that are alike in the same way. So most of a proof can run on few of them: the
class and the weights are the same, and it takes a fraction of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from patchscope_nn import models
from patchscope_nn.models import Model, is_offloaded

#: A model of fewer blocks than this many times those that are kept is not worth the copy.
_WORTH = 2


def shortened(model: Model, layers: Sequence[int]) -> Model | None:
    """Build a model from a few blocks of another. Both share the weights, and the other is not changed.

    None if it would not be much shorter, if blocks differ in more than their weights and their index, or if a
    model of this family cannot be built in this way.
    """
    path = model.info.architecture.blocks
    blocks = [*model.module.get_submodule(path)]
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())  # noqa: SLF001
    if len(blocks) <= _WORTH * len(layers) or hooked or is_offloaded(model.module) or not _alike(blocks):
        return None
    try:
        return models.load(_without_others(model.module, path, layers), tokenizer=model.tokenizer)
    except Exception:  # noqa: BLE001 (after any error, the whole model is proven instead)
        return None


def _without_others(module: Any, path: str, layers: Sequence[int]) -> Any:
    """Copy a module with only a few of its blocks; the copy shares the weights."""
    blocks = [*module.get_submodule(path)]
    others = [block for layer, block in enumerate(blocks) if layer not in layers]
    shared = [*module.parameters(), *module.buffers(), *others]
    short = copy.deepcopy(module, {id(part): part for part in shared})
    kept = [short.get_submodule(path)[layer] for layer in layers]
    for part, name in _places([_settings(block) for block in blocks]):
        for place, block in enumerate(kept):
            setattr(block.get_submodule(part), name, place)
    parent, _, name = path.rpartition(".")
    setattr(short.get_submodule(parent), name, torch.nn.ModuleList(kept))
    config = short.config.get_text_config()
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == len(blocks):
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    return short


def _alike(blocks: Sequence[Any]) -> bool:
    """True if blocks have the same parts, sizes and settings; only their index may differ."""
    settings = [_settings(block) for block in blocks]
    places = _places(settings)
    forms = [
        (_parts(block), {key: value for key, value in own.items() if key not in places})
        for block, own in zip(blocks, settings, strict=True)
    ]
    return all(form == forms[0] for form in forms)


def _settings(block: Any) -> dict[tuple[str, str], Any]:
    """Return the plain values in a block's parts, by the part's path and the value's name."""
    return {
        (path, name): value
        for path, part in block.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None)
    }


def _places(settings: Sequence[dict[tuple[str, str], Any]]) -> list[tuple[str, str]]:
    """List the settings that hold the index of the block."""
    return [key for key in settings[0] if [own.get(key) for own in settings] == [*range(len(settings))]]


def _parts(block: Any) -> list[Any]:
    """List the parts of a block, and the sizes of its weights."""
    weights = [*block.named_parameters(), *block.named_buffers()]
    return [
        *((path, type(part)) for path, part in block.named_modules()),
        *((path, weight.shape, weight.dtype, weight.device) for path, weight in weights),
    ]
