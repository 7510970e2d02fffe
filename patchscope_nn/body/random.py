"""Random numbers of many seeds at once, inside a context."""

from __future__ import annotations

import torch


def in_normal(seeds: torch.Tensor, draws: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return standard normal numbers, (n, d_model), each row of which depends only on its seed and draw.

    Each pair of numbers is a hash of seed, draw and column (the finaliser of SplitMix64, Steele et al. 2014),
    turned into normal numbers by Box and Muller's transform. So all rows are made at once, on the model's
    device.

    Args:
        seeds: (n,) the seeds.
        draws: (n,) which draw of its seed a row is.
        like: (m, d_model) a tensor of the dtype that is returned.
    """
    width = like.shape[1]
    columns = torch.arange((width + 1) // 2, device=seeds.device)
    numbers = in_mixed(in_mixed(seeds[:, None]) + draws[:, None]) + columns
    numbers = in_mixed(in_mixed(numbers))
    high, low = (numbers >> 40) & (2**24 - 1), numbers & (2**24 - 1)
    radius = (-2 * ((high.float() + 1) / 2**24).log()).sqrt()
    angle = low.float() * (2 * torch.pi / 2**24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :width].to(like)


def in_mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Scramble whole numbers of 64 bits, one to one; a shift to the right fills up with zeros."""
    numbers = numbers - 0x61C8864680B583EB
    numbers = (numbers ^ ((numbers >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    numbers = (numbers ^ ((numbers >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return numbers ^ ((numbers >> 31) & (2**33 - 1))
