"""Fitting mappings: closed forms on states that two models, or two layers, have of the same texts."""

from patchscope_nn.fit.pairs import parse_pairs
from patchscope_nn.fit.run import fit

__all__ = ["fit", "parse_pairs"]
