"""Fitting mappings and prompts, and saving them with where they come from: `ps.fit(kind, ...)`.

Closed forms, on states that two models or two layers have of the same texts, start from `run.py`; what is
trained or differentiated through a frozen model from `trained.py`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import MappingError, did_you_mean
from patchscope_nn.fitting.cached import PlannedFit, plan_fit
from patchscope_nn.fitting.closed.fit import fit_mapping
from patchscope_nn.fitting.closed.pairs import parse_pairs
from patchscope_nn.fitting.planned import Planned, same_model
from patchscope_nn.fitting.planned_training import PlannedTraining, plan_training
from patchscope_nn.fitting.trained.fit import TRAINED, fit_trained
from patchscope_nn.fitting.trained.soft_prompt import FittedPrompt
from patchscope_nn.mappings import Fitted
from patchscope_nn.spec.fitting import FIT_KINDS


@checked
def fit(kind: str = "affine", **given: Any) -> Fitted | FittedPrompt:
    """Fit a mapping or a prompt, and measure it on what was held out.

    Args:
        kind: `affine`, `orthogonal`, `low_rank` or `scale`, which are closed forms; or one of `TRAINED`.
        **given: What `fit_mapping` takes, or for `TRAINED` what `fit_trained` takes. Both take `out`, the
            file to save to.

    Returns:
        A `Fitted`, which a Patchscope takes as its `mapping`; for `soft_prompt` a `FittedPrompt`.

    Raises:
        InputError: Something given does not resolve, or does not fit the data.
    """
    if kind in TRAINED:
        return fit_trained(kind, **given)
    if kind in FIT_KINDS:
        return fit_mapping(kind, **given)  # type: ignore[arg-type]  # it is one of them
    raise MappingError(f"{kind!r} is no kind of fit.", hint=did_you_mean(kind, (*FIT_KINDS, *TRAINED)))


class _Called(ModuleType):
    """A package that can be called: once it is imported, Python gives its parent the name `fit` for it."""

    def __call__(self, kind: str = "affine", **given: Any) -> Fitted | FittedPrompt:
        return fit(kind, **given)


sys.modules[__name__].__class__ = _Called

__all__ = [
    "TRAINED",
    "FittedPrompt",
    "Planned",
    "PlannedFit",
    "PlannedTraining",
    "fit",
    "fit_mapping",
    "fit_trained",
    "parse_pairs",
    "plan_fit",
    "plan_training",
    "same_model",
]
