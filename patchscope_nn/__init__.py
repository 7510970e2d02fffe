"""patchscope_nn: ask a language model, in its own words, what one of its hidden states means.

A Patchscope (Ghandeharioun et al. 2024, arXiv 2401.06102) takes the hidden state at a position and layer of
a source prompt, maps it, writes it into a target prompt, and reads what the model then says.

Names are imported when they are first used, so that `import patchscope_nn` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchscope_nn.data.readers import reader
    from patchscope_nn.errors import InputError, PatchscopeError, RunError
    from patchscope_nn.fitting import fit
    from patchscope_nn.mappings import Affine, Fitted, Provenance, Space
    from patchscope_nn.metrics import column, metric
    from patchscope_nn.models import Model
    from patchscope_nn.plan import Optimisations
    from patchscope_nn.proof import load
    from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
    from patchscope_nn.recipe import Recipe, load_recipe
    from patchscope_nn.runs.experiments import Experiment
    from patchscope_nn.runs.explain import explain
    from patchscope_nn.runs.results import Run, load_run
    from patchscope_nn.runs.run import run
    from patchscope_nn.spec import (
        Patchscope,
        Readout,
        Site,
        Source,
        Target,
        prompts,
        register_readout,
        register_site,
    )
    from patchscope_nn.spec.mapping import mapping
    from patchscope_nn.spec.positions import Each, Span

__version__ = "0.2.0"

_HOMES = {
    "data.readers": ("reader",),
    "errors": ("InputError", "PatchscopeError", "RunError"),
    "fitting": ("fit",),
    "mappings": ("Affine", "Fitted", "Provenance", "Space"),
    "metrics": ("column", "metric"),
    "models": ("Model",),
    "plan": ("Optimisations",),
    "proof": ("load",),
    "readouts": ("Choices", "Generate", "Hidden", "NextToken"),
    "recipe": ("Recipe", "load_recipe"),
    "runs.experiments": ("Experiment",),
    "runs.explain": ("explain",),
    "runs.results": ("Run", "load_run"),
    "runs.run": ("run",),
    "spec": (
        *("Patchscope", "Readout", "Site", "Source", "Target"),
        *("register_readout", "register_site"),
    ),
    "spec.mapping": ("mapping",),
    "spec.positions": ("Each", "Span"),
}
#: Public names that are modules.
_MODULES = {"prompts": "spec.prompts"}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Affine",
    "Choices",
    "Each",
    "Experiment",
    "Fitted",
    "Generate",
    "Hidden",
    "InputError",
    "Model",
    "NextToken",
    "Optimisations",
    "Patchscope",
    "PatchscopeError",
    "Provenance",
    "Readout",
    "Recipe",
    "Run",
    "RunError",
    "Site",
    "Source",
    "Space",
    "Span",
    "Target",
    "column",
    "explain",
    "fit",
    "load",
    "load_recipe",
    "load_run",
    "mapping",
    "metric",
    "prompts",
    "reader",
    "register_readout",
    "register_site",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"patchscope_nn.{_MODULES[name]}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'patchscope_nn' has no attribute {name!r}")
    return getattr(importlib.import_module(f"patchscope_nn.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
