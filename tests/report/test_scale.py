"""The colour scale of heatmaps: one for patched cells and controls, and its bar says where it is cut."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from drawn import layer_pair_heatmap, token_heatmap
from tables import make_table

from patchscope_nn.report.figures.paper import draw
from patchscope_nn.report.figures.scale import Scale, common_scale

CELLS = np.linspace(0, 1, 50)


@pytest.mark.parametrize(
    ("patched", "controls", "expected"),
    [
        pytest.param(CELLS, CELLS, Scale(0, 1), id="all within 0..1"),
        pytest.param(CELLS / 2, CELLS / 3, Scale(0, 1), id="all well within 0..1"),
        pytest.param(CELLS, 3 * CELLS, Scale(0, 3), id="controls that are a little larger"),
        pytest.param(CELLS, 25 * CELLS, Scale(0, 1, above=True), id="controls that are far larger"),
        pytest.param(CELLS, -25 * CELLS, Scale(0, 1, below=True), id="controls that are far smaller"),
        pytest.param(CELLS, 50 * CELLS - 25, Scale(0, 1, below=True, above=True), id="both"),
        pytest.param(10 + CELLS, 3 + CELLS, Scale(10, 11, below=True), id="patched cells beyond 0..1"),
        pytest.param(100 * CELLS, CELLS, Scale(0, 100), id="controls that are smaller, within what there is"),
        pytest.param(np.append(CELLS, 25), CELLS, Scale(0, 1, above=True), id="one patched cell far off"),
        pytest.param(
            np.append(CELLS, np.full(5, 25)), CELLS, Scale(0, 25), id="a tenth of the patched cells"
        ),
        pytest.param(np.full(9, 7.0), 25 * CELLS, Scale(0, 25), id="patched cells that are all the same"),
        pytest.param(np.array([1.0]), np.array([25.0]), Scale(1, 25), id="one of each"),
        pytest.param(np.array([]), 25 * CELLS, Scale(0, 25), id="controls alone"),
        pytest.param(np.full(3, np.nan), np.array([]), Scale(0, 1), id="nothing"),
    ],
)
def test_the_scale_of_patched_cells_and_controls(patched: Any, controls: Any, expected: Scale) -> None:
    found = common_scale(patched, controls)
    assert found[:2] == pytest.approx(expected[:2])
    assert found[2:] == expected[2:]


@pytest.mark.parametrize(
    ("scale", "names"),
    [
        (Scale(0, 1), None),
        (Scale(0, 1, above=True), ["0", "0.2", "0.4", "0.6", "0.8", "1 or more"]),
        (Scale(0, 1, below=True), ["0 or less", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Scale(-4, 12.2, below=True, above=True), ["-4 or less", "0", "5", "12.2 or more"]),
        (Scale(9000, 51000, above=True), ["10,000", "20,000", "30,000", "40,000", "51,000 or more"]),
    ],
)
def test_the_ticks_of_a_bar(scale: Scale, names: list[str] | None) -> None:
    ticks = scale.ticks()
    assert ticks.get("ticktext") == names
    if names:
        assert ticks["tickvals"] == sorted(ticks["tickvals"])
        assert len(ticks["tickvals"]) == len(names)


def nll(table: pd.DataFrame, *, controls: tuple[float, float]) -> pd.DataFrame:
    random = np.random.default_rng(0)
    values = random.uniform(0, 1, len(table))
    of_controls = random.uniform(*controls, len(table))
    return table.assign(nll_nats=np.where(table["control"].isna(), values, of_controls))


def figure_of(kind: str, *, controls: tuple[float, float]) -> Any:
    names = ("unpatched", "random", "shuffled")
    if kind == "pairs":
        table = make_table(n_rows=3, layers=range(6), target_layers=range(6), controls=names)
        return layer_pair_heatmap(nll(table, controls=controls), metric="nll_nats")
    table = make_table(n_rows=1, layers=range(9), positions=range(7), controls=names)
    return token_heatmap(nll(table, controls=controls), metric="nll_nats", row=0)


@pytest.mark.parametrize("kind", ["pairs", "tokens"])
def test_a_bar_says_that_controls_are_beyond_its_end(kind: str) -> None:
    figure = figure_of(kind, controls=(5, 25))
    axis = figure.layout.coloraxis
    assert axis.cmax <= 1
    assert axis.colorbar.ticktext[-1] == f"{axis.cmax:,.6g} or more"
    assert axis.colorbar.tickvals[-1] == axis.cmax
    bar = draw(figure).axes[-1]
    assert [label.get_text() for label in bar.get_yticklabels()] == list(axis.colorbar.ticktext)
    assert bar._colorbar.extend == "max"


@pytest.mark.parametrize("kind", ["pairs", "tokens"])
def test_a_scale_that_is_not_cut_spans_the_controls(kind: str) -> None:
    figure = figure_of(kind, controls=(1, 3))
    shown = np.concatenate([np.ravel(np.asarray(trace.z, dtype=float)) for trace in figure.data])
    assert figure.layout.coloraxis.cmax == pytest.approx(np.nanmax(shown))
    assert figure.layout.coloraxis.colorbar.ticktext is None
    assert draw(figure).axes[-1]._colorbar.extend == "neither"


def test_tokens_are_named_beside_the_left_panels_alone() -> None:
    """Beside the others their names would run into the panel on the left."""
    figure = figure_of("tokens", controls=(1, 3))
    named = [figure.layout[name].showticklabels is not False for name in ("yaxis", "yaxis2", "yaxis3")]
    assert named == [True, False, True]
    assert [axes.get_ylabel() for axes in draw(figure).axes[:3]] == ["token read", "", "token read"]
