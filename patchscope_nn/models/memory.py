"""The available memory, and reusing freed memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patchscope_nn.models.info import ELSEWHERE, ModelInfo

#: The fraction of free memory that a forward pass may use: estimates can be wrong, and memory is shared.
_SHARE = 0.5


def usable_memory(info: ModelInfo) -> int | None:
    """Return the number of bytes that a forward pass may use: half of the free memory of the model's device.

    For a model on several devices, the device of the embedding is used. For an engine of requests, it is the
    memory for keys and values. None if it is not known.
    """
    import torch

    if info.held_tokens is not None:
        return info.held_tokens * info.n_layers * info.sizes.cache * info.bytes_per_number
    if info.device == ELSEWHERE:
        return None
    if info.device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(info.device)
        # PyTorch holds memory that it has freed, for its next tensors.
        free += torch.cuda.memory_reserved(info.device) - torch.cuda.memory_allocated(info.device)
    else:
        import psutil

        free = psutil.virtual_memory().available
    return int(free * _SHARE)


#: Parameters of glibc's `mallopt`, and their default values.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TRIM_THRESHOLD, _MMAP_MAX = 2**17, 2**16


@contextmanager
def memory_reused() -> Iterator[None]:
    """While active, keep freed memory for reuse; at the end, return it to the system.

    By default glibc requests each large block, for example the logits of a pass, from the system, which
    clears it page by page. That takes about 5 % of a sweep's time. Without glibc this does nothing.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        libc.malloc_trim(0)
