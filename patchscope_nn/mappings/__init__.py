"""Mappings f: from the source model's hidden space to the target's.

A mapping is resolved, before any context opens, to a `ResolvedMapping`: a kind and tensors, which is all
that travels into one. `apply_mapping` is the one function that runs there.
"""

from patchscope_nn.body.mappings import Pair, Parts, apply_mapping, map_parts
from patchscope_nn.mappings.affine import Affine
from patchscope_nn.mappings.fitted import Fitted, listed, pair_text
from patchscope_nn.mappings.provenance import Provenance, Space
from patchscope_nn.mappings.resolve import ResolvedMapping, resolve_mapping

__all__ = [
    "Affine",
    "Fitted",
    "Pair",
    "Parts",
    "Provenance",
    "ResolvedMapping",
    "Space",
    "apply_mapping",
    "listed",
    "map_parts",
    "pair_text",
    "resolve_mapping",
]
