"""Mappings f, from the source model's hidden space to the target model's.

Before any nnsight context opens, a mapping is resolved to a `ResolvedMapping`: a kind and either tensors or a
function. Only these enter a context, where `apply_mapping` applies them.
"""

from patchscope_nn.body.mappings import Pair, Parts, apply_mapping, map_parts
from patchscope_nn.mappings.affine import Affine
from patchscope_nn.mappings.fitted import Fitted
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
    "map_parts",
    "resolve_mapping",
]
