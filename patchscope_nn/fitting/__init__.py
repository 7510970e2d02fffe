"""Fitting mappings and prompts: `ps.fit(kind, ...)`.

closed/              closed forms, from the states of two models or two layers at the same places of texts
trained/             kinds that are trained or differentiated through a frozen model, one file a kind
reading.py           hidden states read by the compiler, for both
reporting.py         the progress and the notices of both
cached.py            a closed form that a recipe asks for
planned_training.py  a training that a recipe asks for
"""

from __future__ import annotations

from typing import Any

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import MappingError, did_you_mean
from patchscope_nn.fitting.cached import plan_fit
from patchscope_nn.fitting.closed.fit import fit_mapping
from patchscope_nn.fitting.closed.pairs import parse_pairs
from patchscope_nn.fitting.planned import Planned, same_model
from patchscope_nn.fitting.planned_training import plan_training
from patchscope_nn.fitting.trained.fit import fit_trained
from patchscope_nn.fitting.trained.kinds import TRAINED
from patchscope_nn.fitting.trained.outcome import FittedPrompt
from patchscope_nn.mappings import Fitted
from patchscope_nn.spec.fitting import FIT_KINDS


@checked
def fit(kind: str = "affine", **options: Any) -> Fitted | FittedPrompt:
    """Fit a mapping or a prompt, and score it on held-out data.

    Args:
        kind: `affine`, `orthogonal`, `low_rank` or `scale`, which are closed forms; or one of `TRAINED`.
        **options: The arguments of `fit_mapping`, or for `TRAINED` those of `fit_trained`. Both take `out`,
            the file to save to.

    Returns:
        A `Fitted`, which a Patchscope takes as its `mapping`; for `soft_prompt` a `FittedPrompt`.

    Raises:
        InputError: The kind or an option cannot be resolved, or does not fit the data.
    """
    if kind in TRAINED:
        return fit_trained(kind, **options)
    if kind in FIT_KINDS:
        return fit_mapping(kind, **options)  # type: ignore[arg-type]  # one of FIT_KINDS
    raise MappingError(f"{kind!r} is not a kind of fit.", hint=did_you_mean(kind, (*FIT_KINDS, *TRAINED)))


__all__ = [
    "TRAINED",
    "FittedPrompt",
    "Planned",
    "fit",
    "fit_mapping",
    "fit_trained",
    "parse_pairs",
    "plan_fit",
    "plan_training",
    "same_model",
]
