"""The figures as plotly's own objects, which check each value."""

from collections.abc import Callable
from typing import Any

from patchscope_nn.report import figures as ours


def _checked(draw: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: draw(*args, **options).to_plotly()


comparison_curve = _checked(ours.comparison_curve)
layer_curve = _checked(ours.layer_curve)
layer_pair_heatmap = _checked(ours.layer_pair_heatmap)
text_heatmap = _checked(ours.text_heatmap)
token_heatmap = _checked(ours.token_heatmap)


def figures(*args: Any, **options: Any) -> list[tuple[str, Any]]:
    return [(title, figure.to_plotly()) for title, figure in ours.figures(*args, **options)]
