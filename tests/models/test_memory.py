"""How much memory a forward pass may use."""

from __future__ import annotations

from dataclasses import replace

import torch

from patchscope_nn.models import usable_memory
from patchscope_nn.models.info import ELSEWHERE


def test_memory_that_pytorch_holds_for_its_next_tensors_is_free(tiny_model, monkeypatch):
    """It is what earlier passes have freed, so that a later run plans passes as large as the first."""
    given = {"mem_get_info": (1000, 9000), "memory_reserved": 600, "memory_allocated": 200}
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    info = replace(tiny_model().info, device="cuda:0")
    assert usable_memory(info) == (1000 + 600 - 200) // 2


def test_the_memory_of_a_server_is_not_known(tiny_model):
    assert usable_memory(replace(tiny_model().info, device=ELSEWHERE)) is None
