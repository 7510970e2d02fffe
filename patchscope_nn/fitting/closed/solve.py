"""Closed forms: from sums over states to the map of one pair of layers.

    affine      W = (Sxx + lambda I)^-1 Sxy about the means: ridge regression, with a bias
    low_rank    the best map of rank r for the same loss: W V V^T, V the r largest right singular vectors of
                (Sxx + lambda I)^1/2 W (reduced-rank ridge regression, Mukherjee and Zhu 2011)
    orthogonal  W = U V^T of Sxy = U S V^T about the means: a rotation (Procrustes, Schoenemann 1966)
    scale       f(h) = alpha h, alpha from a grid

lambda and alpha are chosen by the least squared error on texts that the map was not fitted on; the map is
then fitted again with these texts included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from patchscope_nn.errors import InputError
from patchscope_nn.fitting.closed.sums import Centred, Sums
from patchscope_nn.mappings import Pair
from patchscope_nn.spec import Fit

#: alpha of `scale`: 2^(k/8) between 1/16 and 16, so that 1 is one of them.
ALPHAS = tuple(2.0 ** (step / 8) for step in range(-32, 33))


@dataclass(frozen=True, kw_only=True)
class Solution:
    """One pair's map.

    Attributes:
        parts: Its tensors, in float32.
        mean: (d_out,) the mean of the target's states in the fit, the baseline for the score.
        settings: The chosen `lambda` or `alpha`, and whether it is at an end of its grid.
        n: How many states it was fitted on.
    """

    parts: dict[str, torch.Tensor]
    mean: torch.Tensor
    settings: dict[str, Any]
    n: int


def solve(options: Fit, fitted: Sums, choosing: Sums, pair: Pair) -> Solution:
    """Fit the map of one pair, from sums over the states to fit on and to choose lambda or alpha by.

    Raises:
        InputError: The kind needs spaces of one size and these differ, or the rank is too large.
    """
    first = fitted.centred(pair)
    both = fitted.plus(choosing).centred(pair)
    _check(options, *first.xy.shape)
    if options.kind == "scale":
        return _scale(choosing, both, pair)
    if options.kind == "orthogonal":
        left, _, right = torch.linalg.svd(both.xy, full_matrices=False)
        return _solution({"weight": (left @ right).T}, both, {})
    second = choosing.centred(pair, mean_x=first.mean_x, mean_y=first.mean_y)
    ridge = _choose(first, second, options)
    at_end = len(options.lambdas) > 1 and ridge in (options.lambdas[0], options.lambdas[-1])
    rank = {} if options.rank is None else {"rank": options.rank}
    settings = rank | {"lambda": ridge, "at_end_of_grid": at_end}
    return _solution(_ridge(both, ridge, options.rank), both, settings)


def identity() -> Solution:
    """The map of a layer of one model to itself, which is not fitted."""
    return Solution(parts={"scale": torch.ones(1)}, mean=torch.zeros(()), settings={}, n=0)


def shapes(options: Fit, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a fitted pair's tensors, by name."""
    if options.kind == "scale":
        return {"scale": (1,)}
    if options.rank is not None:
        return {"up": (d_out, options.rank), "down": (options.rank, d_in), "bias": (d_out,)}
    return {"weight": (d_out, d_in), "bias": (d_out,)}


def _check(options: Fit, d_in: int, d_out: int) -> None:
    if options.kind in ("orthogonal", "scale") and d_in != d_out:
        raise InputError(
            f"{options.kind} maps between spaces of one size; these have {d_in} and {d_out}.",
            hint="Fit kind affine or low_rank instead.",
        )
    if options.rank is not None and options.rank > min(d_in, d_out):
        raise InputError(
            f"rank={options.rank} is more than the smaller space has dimensions, {min(d_in, d_out)}.",
            hint="Give a smaller rank, or fit kind affine.",
        )


def _eigen(products: Centred) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(products.xx)
    return values.clamp_min(0), vectors


def _ridge(products: Centred, ridge: float, rank: int | None) -> dict[str, torch.Tensor]:
    """`weight` (d_out, d_in); with a rank its factors, `up` (d_out, rank) and `down` (rank, d_in)."""
    values, vectors = _eigen(products)
    damped = values + ridge * values.mean()
    weight = (vectors.T @ products.xy) / damped[:, None]
    if rank is None:
        return {"weight": (vectors @ weight).T}
    up = _directions(weight, damped, rank)
    return {"up": up, "down": (vectors @ (weight @ up)).T}


def _directions(weight: torch.Tensor, damped: torch.Tensor, rank: int) -> torch.Tensor:
    """(d_out, rank): the directions of y that a map of that rank keeps."""
    return torch.linalg.svd(damped.sqrt()[:, None] * weight, full_matrices=False).Vh[:rank].T


def _choose(first: Centred, second: Centred, options: Fit) -> float:
    """The lambda with which a map fitted on `first` has the least squared error on `second`."""
    if len(options.lambdas) == 1:
        return options.lambdas[0]
    values, vectors = _eigen(first)
    target = vectors.T @ first.xy
    xx, xy = vectors.T @ second.xx @ vectors, vectors.T @ second.xy
    losses = []
    for ridge in options.lambdas:
        damped = values + ridge * values.mean()
        weight = target / damped[:, None]
        if options.rank is not None:
            up = _directions(weight, damped, options.rank)
            weight = weight @ up @ up.T
        losses.append(float((weight * (xx @ weight)).sum() - 2 * (weight * xy).sum()))
    return options.lambdas[losses.index(min(losses))]


def _scale(choosing: Sums, both: Centred, pair: Pair) -> Solution:
    zero = torch.zeros_like(both.mean_x)
    about_zero = choosing.centred(pair, mean_x=zero, mean_y=zero)
    cross, square = float(about_zero.xy.diagonal().sum()), float(about_zero.xx.diagonal().sum())
    losses = [alpha * alpha * square - 2 * alpha * cross for alpha in ALPHAS]
    alpha = ALPHAS[losses.index(min(losses))]
    return Solution(
        parts={"scale": torch.tensor([alpha])},
        mean=both.mean_y.float(),
        settings={"alpha": alpha, "at_end_of_grid": alpha in (ALPHAS[0], ALPHAS[-1])},
        n=both.n,
    )


def _solution(linear: dict[str, torch.Tensor], products: Centred, settings: dict[str, Any]) -> Solution:
    """Add the bias with which the mean of x is mapped to the mean of y."""
    mapped = products.mean_x
    for name in ("down", "up", "weight"):
        mapped = linear[name] @ mapped if name in linear else mapped
    parts = linear | {"bias": products.mean_y - mapped}
    return Solution(
        parts={name: tensor.float() for name, tensor in parts.items()},
        mean=products.mean_y.float(),
        settings=settings,
        n=products.n,
    )
