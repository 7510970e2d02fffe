"""How much memory there is to use, and using it again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patchscope_nn.models.info import ELSEWHERE, ModelInfo

#: The share of what is free that a forward pass may take: estimates err, and others use the machine too.
_SHARE = 0.5


def usable_memory(info: ModelInfo) -> int | None:
    """The bytes that a forward pass of a model may take: half of what its device has free.

    None where its weights are elsewhere. A model over several devices counts with the one that embeds tokens.
    """
    import torch

    if info.device == ELSEWHERE:
        return None
    if info.device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(info.device)
    else:
        import psutil

        free = psutil.virtual_memory().available
    return int(free * _SHARE)


#: glibc's `mallopt`: parameters, and what they are where nobody has set them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TRIM_THRESHOLD, _MMAP_MAX = 2**17, 2**16


@contextmanager
def memory_reused() -> Iterator[None]:
    """Keep freed memory for what comes next, and give it back to the system at the end.

    glibc takes every large block, as the logits of a pass are, from the system anew, which clears it page by
    page: some 5 % of a sweep's time. Elsewhere than under glibc this does nothing.
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
