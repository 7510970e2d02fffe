"""A digest of a model's weights, and how they are quantised."""

from __future__ import annotations

import hashlib
from typing import Any

from patchscope_nn.models.info import ELSEWHERE, Model

#: How many numbers of each tensor are read.
_SAMPLED = 64


def weights_digest(model: Model) -> str | None:
    """Return a hex digest of a sample of a model's weights; None if they are on a server or on disk.

    Of weights that a tensor class of its own packs or distributes, only the class and the shape are read.
    """
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if model.info.device == ELSEWHERE:
        return None
    digest = hashlib.sha256()
    for name, tensor in model.module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            return None
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if is_traceable_wrapper_subclass(tensor):
            digest.update(type(tensor).__name__.encode())
            continue
        step = max(1, tensor.numel() // _SAMPLED)
        digest.update(tensor.detach().flatten()[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def quantisation(model: Model) -> dict[str, Any] | None:
    """Return the quantisation that a model's config names, as plain values; None if there is none."""
    config = getattr(model.module.config, "quantization_config", None)
    if config is None:
        return None
    return dict(config if isinstance(config, dict) else config.to_dict())
