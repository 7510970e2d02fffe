"""The colour scale of a figure: one scale for patched cells and controls, labelled where it is cut off."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

#: The percentage of patched cells at either end that a scale may cut off.
_APART = 2
#: A scale is cut if the range of all cells is larger than that of the other patched cells by this factor.
_FAR = 4
#: The approximate number of ticks on the bar of a scale that is cut.
_TICKS = 7


class Scale(NamedTuple):
    """A colour scale: its ends, and whether some numbers are below the lower or above the upper end."""

    low: float
    high: float
    below: bool = False
    above: bool = False

    def ticks(self) -> dict[str, Any]:
        """Return ticks that label the ends where the scale is cut; empty if it is not, to use plotly's."""
        if not (self.below or self.above):
            return {}
        step = _step((self.high - self.low) / _TICKS)
        inner = [
            step * count for count in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        ]
        # The label of a tick close to an end would overlap the label of the end.
        ends = [end for end, cut in ((self.low, self.below), (self.high, self.above)) if cut]
        values = sorted([tick for tick in inner if all(abs(tick - end) > step / 2 for end in ends)] + ends)
        names = [f"{0.0 if abs(value) < step / 2 else value:,.6g}" for value in values]
        if self.below:
            names[0] += " or less"
        if self.above:
            names[-1] += " or more"
        return {"tickvals": values, "ticktext": names}


def limits(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of a colour scale: 0 and 1 if all numbers are within them, else their range."""
    finite = values[np.isfinite(values)]
    if not finite.size or (finite.min() >= 0 and finite.max() <= 1):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + 1.0


def common_scale(patched: np.ndarray, controls: np.ndarray) -> Scale:
    """Choose one scale for all means of a figure, those of patched cells (NaN if missing) and of controls.

    Usually it spans all cells. If controls or a few patched cells are so far away that the other patched
    cells would share one colour, the scale spans only the latter, and cells beyond it have the colour of the
    nearer end.
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
    # Round the ends outwards.
    unit = _step(span / 20)
    return Scale(
        math.floor(round(inner_low / unit, 6)) * unit if below else min(low, inner_low),
        math.ceil(round(inner_high / unit, 6)) * unit if above else max(high, inner_high),
        below,
        above,
    )


def _step(size: float) -> float:
    """Round up to 1, 2, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))
