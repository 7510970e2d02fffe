"""Fitting mappings and prompts, and saving them with where they come from: `ps.fit(kind, ...)`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchscope_nn.fit.soft_prompt import FittedPrompt
    from patchscope_nn.mappings import Fitted


def fit(kind: str, *, out: str | Path | None = None, **given: Any) -> Fitted | FittedPrompt:
    """Fit a mapping or a prompt, and score it on what was held out.

    Args:
        kind: `tuned_lens`, `jacobian_lens`, `lre`, `trained_scale`, `trained_scalar_affine`,
            `trained_low_rank`, `trained_affine` or `soft_prompt`.
        out: The safetensors file to write; None writes none.
        **given: `model`, `data` and the rest of `fit_trained`, and the options of the kind.

    Returns:
        A `Fitted`, which a Patchscope takes as its `mapping`; or for `soft_prompt` a `FittedPrompt`.

    Raises:
        InputError: Something given does not resolve, or does not fit the data.
    """
    from patchscope_nn.fit.trained import fit_trained

    found = fit_trained(kind, **given)
    if out is not None:
        found.save(out)
    return found


class _Called(ModuleType):
    """A package that can be called: Python names it `ps.fit` once it is imported, and `ps.fit(...)` fits."""

    def __call__(self, kind: str, **given: Any) -> Fitted | FittedPrompt:
        return fit(kind, **given)


sys.modules[__name__].__class__ = _Called

__all__ = ["fit"]
