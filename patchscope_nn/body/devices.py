"""Sends tensors of a program to the device of a model, inside a context."""

from __future__ import annotations

from typing import Any

import torch


def in_sent(tensor: torch.Tensor, device: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor on another device, without waiting for that device to finish what it is doing.

    Only a copy to a GPU need not wait: the tensor's memory has been read when this returns. A copy from a GPU
    waits, because its numbers are not known before.
    """
    ahead = torch.device(device).type == "cuda"
    return tensor.to(device=device, dtype=tensor.dtype if dtype is None else dtype, non_blocking=ahead)
