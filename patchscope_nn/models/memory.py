"""How much memory there is to use."""

from __future__ import annotations

from patchscope_nn.models.info import ModelInfo

#: The share of what is free that a forward pass may take: estimates err, and others use the machine too.
_SHARE = 0.5


def usable_memory(info: ModelInfo) -> int:
    """The bytes that a forward pass of a model may take: half of what its device has free.

    A model over several devices counts with the one that embeds its tokens.
    """
    import torch

    if info.device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(info.device)
    else:
        import psutil

        free = psutil.virtual_memory().available
    return int(free * _SHARE)
