"""The options of a mapping that is fitted before the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from patchscope_nn._util.checking import NAMED, Spec
from patchscope_nn.spec.forms import floats

FitKind: TypeAlias = Literal["affine", "orthogonal", "low_rank", "scale"]
FIT_KINDS: tuple[str, ...] = get_args(FitKind)
#: Values of lambda, in units of the mean variance of a dimension of the source's states times their number.
LAMBDAS = tuple(10.0**power for power in range(-6, 2))


def _rising(lambdas: tuple[float, ...]) -> tuple[float, ...]:
    if list(lambdas) != sorted(set(lambdas)):
        raise ValueError("should increase, for example [0.001, 0.01, 0.1]")
    return lambdas


class Fit(Spec):
    """A mapping that is fitted before the run, on the pairs of layers the run needs, and cached."""

    kind: FitKind = "affine"
    """`affine` (ridge regression), `orthogonal` (a rotation), `low_rank` (ridge regression of rank `rank`) or
    `scale` (one number)."""
    data: dict[str, Any] | None = None
    """The texts, as a recipe's `data`; None takes texts that ship with this package."""
    column: Annotated[str, Field(min_length=1)] | None = None
    """The column of the texts; None takes the only column with texts, or `text`."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The fraction of the texts that is held out to measure the reported numbers."""
    limit: Annotated[int, Field(ge=3)] | None = None
    """The maximum number of texts; None reads all."""
    positions: Annotated[int, Field(ge=1)] | None = 32
    """The number of random positions taken from each text; None takes all."""
    max_tokens: Annotated[int, Field(ge=2)] = 256
    """The maximum number of tokens read of a text."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """The rank of `low_rank`."""
    lambdas: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...],
        Field(min_length=1),
        BeforeValidator(floats),
        AfterValidator(_rising),
    ] = LAMBDAS
    """The values of lambda to try, in units of the mean variance of a dimension times the number of states.
    Several values are compared on texts that were not used for fitting."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of the choice of texts and positions."""

    @model_validator(mode="after")
    def _ranked(self) -> Self:
        if (self.kind == "low_rank") != (self.rank is not None):
            raise ValueError("only kind low_rank has a rank: give both, as in {kind: low_rank, rank: 16}")
        return self


NAMED["fit"] = Fit
