"""The random numbers of random states and of noise, in plain Python."""

from __future__ import annotations

import math

import torch

_ALL = 2**64 - 1


def mixed(number):
    """The finaliser of SplitMix64."""
    number = number + 0x9E3779B97F4A7C15 & _ALL
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _ALL
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _ALL
    return number ^ number >> 31


def normal(seed, draw, width):
    """(width,) standard normal numbers, by Box and Muller's transform."""
    first, second = [], []
    for column in range((width + 1) // 2):
        number = mixed(mixed(mixed(mixed(seed) + draw) + column & _ALL))
        radius = math.sqrt(-2 * math.log(((number >> 40) + 1) / 2**24))
        angle = 2 * math.pi * (number % 2**24) / 2**24
        first.append(radius * math.cos(angle))
        second.append(radius * math.sin(angle))
    return torch.tensor((first + second)[:width])
