"""Weights and factors of states keep their digits in half precision."""

from __future__ import annotations

import torch

from patchscope_nn.body.states import in_sums, in_write
from patchscope_nn.lower.mapping import identity_writing


def states(count):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_a_mean_is_rounded_once():
    table = states(3)
    third = {
        "count": 1,
        "states": torch.arange(3),
        "weights": torch.full((3,), 1 / 3, dtype=torch.double),
        "into": torch.zeros(3, dtype=torch.long),
    }
    found = in_sums(table, third)
    assert torch.equal(found[:3], table)
    assert torch.equal(found[3], table.float().mean(0).bfloat16())


def test_a_factor_is_not_rounded():
    table, value = states(1), torch.zeros(1, 1, 64).bfloat16()
    where = torch.zeros(1, dtype=torch.long)
    in_write(
        value,
        {
            "cells": where,
            "rows": where,
            "positions": where,
            "states": where,
            "pairs": torch.zeros(1, 2, dtype=torch.long),
            "scales": torch.tensor([0.3], dtype=torch.double),
            "random": None,
            "first": None,
        },
        table,
        identity_writing(),
    )
    assert torch.equal(value[0, 0], (table[0].float() * 0.3).bfloat16())
