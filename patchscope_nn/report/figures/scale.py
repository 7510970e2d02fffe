"""The colour scale of a figure: one for patched cells and controls, and said where it is cut."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

#: The share of patched cells at either end that a scale may leave out, in percent.
_APART = 2
#: A scale is cut where all cells span so many times what the other patched cells span.
_FAR = 4
#: About how many ticks the bar of a scale that is cut has.
_TICKS = 7


class Scale(NamedTuple):
    """The ends of a colour scale, and whether there are numbers below or above them."""

    low: float
    high: float
    below: bool = False
    above: bool = False

    def ticks(self) -> dict[str, Any]:
        """Ticks of the bar that name an end where the scale is cut; a whole scale's are left to plotly."""
        if not (self.below or self.above):
            return {}
        step = _step((self.high - self.low) / _TICKS)
        inner = [
            step * count for count in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        ]
        # A tick that nearly meets an end would be written over its name.
        ends = [end for end, cut in ((self.low, self.below), (self.high, self.above)) if cut]
        values = sorted([tick for tick in inner if all(abs(tick - end) > step / 2 for end in ends)] + ends)
        names = [f"{0.0 if abs(value) < step / 2 else value:,.6g}" for value in values]
        if self.below:
            names[0] += " and less"
        if self.above:
            names[-1] += " and more"
        return {"tickvals": values, "ticktext": names}


def limits(values: np.ndarray) -> tuple[float, float]:
    """The ends of a colour scale; numbers within 0..1 share one scale in all figures."""
    finite = values[np.isfinite(values)]
    if not finite.size or (finite.min() >= 0 and finite.max() <= 1):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + 1.0


def common_scale(patched: np.ndarray, controls: np.ndarray) -> Scale:
    """One scale for all cells of a figure.

    It spans all of them, unless controls or a few patched cells lie so far from the other patched cells that
    these would share one colour. Then it ends with these, and a cell beyond it has the colour of that end.

    Args:
        patched: The means of the patched cells; NaN where there is none.
        controls: Those of the controls.
    """
    low, high = limits(np.concatenate([patched, controls]))
    own = patched[np.isfinite(patched)]
    if not own.size:
        return Scale(low, high)
    bulk = np.array(
        [np.percentile(own, _APART, method="higher"), np.percentile(own, 100 - _APART, method="lower")]
    )
    inner_low, inner_high = limits(bulk)
    span = inner_high - inner_low
    if bulk[0] >= bulk[1] or high - low <= _FAR * span:
        return Scale(low, high)
    below, above = low < inner_low - span, high > inner_high + span
    # Round ends, outwards.
    unit = _step(span / 20)
    return Scale(
        math.floor(round(inner_low / unit, 6)) * unit if below else min(low, inner_low),
        math.ceil(round(inner_high / unit, 6)) * unit if above else max(high, inner_high),
        below,
        above,
    )


def _step(size: float) -> float:
    """The next larger of 1, 2, 5, 10, ..., times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))
