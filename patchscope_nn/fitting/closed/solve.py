"""Closed forms: from sums over states to the map of one pair of layers.

    affine      W = (Sxx + lambda I)^-1 Sxy about the means: ridge regression, with a bias
    low_rank    the best map of rank r for the same loss: W V V^T, V the r largest right singular vectors of
                (Sxx + lambda I)^1/2 W (reduced-rank ridge regression, Mukherjee and Zhu 2011)
    orthogonal  W = U V^T of Sxy = U S V^T about the means: a rotation (Procrustes, Schoenemann 1966)
    scale       f(h) = alpha h, alpha from a grid

lambda and alpha are those with the least squared error on texts that they were not fitted on, and then the
map is fitted again on these texts, too.
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
        mean: (d_out,) the mean of the target's states it was fitted on: what to compare a map with.
        settings: What was chosen: `lambda` or `alpha`, and whether it stands at an end of its grid.
        n: How many states it was fitted on.
    """

    parts: dict[str, torch.Tensor]
    mean: torch.Tensor
    settings: dict[str, Any]
    n: int


def solve(options: Fit, fitted: Sums, choosing: Sums, pair: Pair) -> Solution:
    """Fit the map of one pair.

    Args:
        options: The kind, and what decides it.
        fitted: Sums over the states that are fitted on.
        choosing: Sums over those that settings are chosen by.
        pair: (l, l*).

    Raises:
        InputError: The two spaces have different sizes, and the kind needs one size; or a rank is too large.
    """
    one = fitted.centred(pair)
    both = fitted.plus(choosing).centred(pair)
    _check(options, one)
    if options.kind == "scale":
        return _scale(choosing, both, pair)
    if options.kind == "orthogonal":
        left, _, right = torch.linalg.svd(both.xy, full_matrices=False)
        return _solution((left @ right).T, both, {})
    other = choosing.centred(pair, mean_x=one.mean_x, mean_y=one.mean_y)
    chosen = _choose(one, other, options)
    weight = _ridge(_eigen(both), both, chosen, options.rank)
    ends = (options.lambdas[0], options.lambdas[-1])
    settings = {"lambda": chosen, "at_end_of_grid": len(options.lambdas) > 1 and chosen in ends}
    return _solution(weight, both, settings, rank=options.rank)


def itself() -> Solution:
    """Identity."""
    return Solution(parts={"scale": torch.ones(1)}, mean=torch.zeros(()), settings={}, n=0)


def _check(options: Fit, one: Centred) -> None:
    d_in, d_out = one.xy.shape
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


def _eigen(one: Centred) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(one.xx)
    return values.clamp_min(0), vectors


def _ridge(
    eigen: tuple[torch.Tensor, torch.Tensor], one: Centred, chosen: float, rank: int | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The weight, (d_out, d_in); of a rank its two factors."""
    values, vectors = eigen
    weighed = values + chosen * values.mean()
    weight = (vectors.T @ one.xy) / weighed[:, None]
    if rank is None:
        return (vectors @ weight).T
    up = _directions(weight, weighed, rank)
    return up, (vectors @ (weight @ up)).T


def _directions(weight: torch.Tensor, weighed: torch.Tensor, rank: int) -> torch.Tensor:
    """(d_out, rank): the directions of y that a map of that rank keeps."""
    return torch.linalg.svd(weighed.sqrt()[:, None] * weight, full_matrices=False).Vh[:rank].T


def _choose(one: Centred, other: Centred, options: Fit) -> float:
    """The lambda with the least squared error on other states."""
    if len(options.lambdas) == 1:
        return options.lambdas[0]
    values, vectors = _eigen(one)
    target = vectors.T @ one.xy
    xx, xy = vectors.T @ other.xx @ vectors, vectors.T @ other.xy
    losses = []
    for chosen in options.lambdas:
        weighed = values + chosen * values.mean()
        weight = target / weighed[:, None]
        if options.rank is not None:
            up = _directions(weight, weighed, options.rank)
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


def _solution(
    weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    one: Centred,
    settings: dict[str, Any],
    *,
    rank: int | None = None,
) -> Solution:
    if isinstance(weight, tuple):
        up, down = weight
        parts = {"up": up, "down": down}
        moved = up @ (down @ one.mean_x)
        settings = {"rank": rank, **settings}
    else:
        parts, moved = {"weight": weight}, weight @ one.mean_x
    parts["bias"] = one.mean_y - moved
    return Solution(
        parts={name: tensor.float() for name, tensor in parts.items()},
        mean=one.mean_y.float(),
        settings=settings,
        n=one.n,
    )
