"""The Patchscope as frozen data, with the same field names in Python and in YAML.

A Patchscope takes the hidden state at (source prompt S, position i, layer l, model M), maps it by f, and
writes it at (target prompt T, position i*, layer l*, model M*). The readout is read from the patched run of
M* (Ghandeharioun et al. 2024, arXiv 2401.06102, section 3.1).

This package does not import torch, so a recipe can be checked in milliseconds.
"""

from patchscope_nn._util.checking import Spec, problems
from patchscope_nn.spec.fitting import Fit, FitKind
from patchscope_nn.spec.mapping import ALIGNED, NAMED_MAPPINGS, AnyMapping, dump_mapping
from patchscope_nn.spec.readout import ColumnType, PassCells, Readout, Tokens, read_position
from patchscope_nn.spec.readout_registry import (
    AnyReadout,
    dump_readout,
    kinds_in,
    readout_kinds,
    register_readout,
)
from patchscope_nn.spec.scope import Patchscope
from patchscope_nn.spec.sides import STATELESS, Control, Source, Target, Vector
from patchscope_nn.spec.sites import ATTENTION, MLP, RESIDUAL, SITES, Site, register_site, site_named
from patchscope_nn.spec.training import TRAIN_KINDS, Train
from patchscope_nn.spec.write import Corrupt, Cut

__all__ = [
    "ALIGNED",
    "ATTENTION",
    "MLP",
    "NAMED_MAPPINGS",
    "RESIDUAL",
    "SITES",
    "STATELESS",
    "TRAIN_KINDS",
    "AnyMapping",
    "AnyReadout",
    "ColumnType",
    "Control",
    "Corrupt",
    "Cut",
    "Fit",
    "FitKind",
    "PassCells",
    "Patchscope",
    "Readout",
    "Site",
    "Source",
    "Spec",
    "Target",
    "Tokens",
    "Train",
    "Vector",
    "dump_mapping",
    "dump_readout",
    "kinds_in",
    "problems",
    "read_position",
    "readout_kinds",
    "register_readout",
    "register_site",
    "site_named",
]
