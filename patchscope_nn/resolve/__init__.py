"""Data rows resolved: prompts filled and tokenized, positions and layers counted out. Pure.

Each distinct prompt is tokenized once and known by its number from then on.
"""

from patchscope_nn.resolve.entry import Entry, Row, Term, Together, VectorAt
from patchscope_nn.resolve.rows import Resolver

__all__ = ["Entry", "Resolver", "Row", "Term", "Together", "VectorAt"]
