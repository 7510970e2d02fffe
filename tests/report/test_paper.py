"""Figures for a paper: what the page draws, drawn by matplotlib; fonts embedded, no text lost."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from drawn import layer_curve, layer_pair_heatmap
from matplotlib.colors import to_hex
from tables import NASTY, make_table

from patchscope_nn.errors import InputError
from patchscope_nn.report.figures import figures, save_figures
from patchscope_nn.report.figures.glyphs import printable
from patchscope_nn.report.figures.paper import draw

CONTROLS = ("unpatched", "random", "shuffled", "text-only")


def test_a_curve_has_the_pages_numbers_colours_and_names() -> None:
    figure = layer_curve(make_table(controls=CONTROLS), metric="precision_at_1")
    axes = draw(figure).axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    named = {trace.name: trace for trace in figure.data if trace.fill != "toself"}
    assert set(drawn) == set(named) == {"patched", *(f"{name} (control)" for name in CONTROLS)}
    for name, line in drawn.items():
        np.testing.assert_allclose(line.get_ydata(), named[name].y)
        assert to_hex(line.get_color()) == named[name].line.color
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("source layer", "Precision@1")
    assert [patch.get_label() for patch in axes.patches] == ["95 % interval"]


def test_units_stand_on_the_axes_and_scales_share_one() -> None:
    figure = layer_curve(make_table(scales=(0.5, 1.0, 2.0), n_rows=4), metric="surprisal_nats")
    first, *others = draw(figure).axes
    assert "(nats)" in first.get_ylabel()
    assert [one.get_title() for one in (first, *others)] == ["scale 0.5", "scale 1", "scale 2"]
    assert {one.get_ylim() for one in others} == {first.get_ylim()}


def test_a_heatmap_has_the_pages_numbers_and_its_controls() -> None:
    table = make_table(n_rows=3, layers=range(4), target_layers=range(5), controls=CONTROLS)
    figure = layer_pair_heatmap(table, metric="precision_at_1")
    paper = draw(figure)
    titled = {axes.get_title(): axes for axes in paper.axes if axes.get_title()}
    assert set(titled) == {"patched", "random (control)", "shuffled (control)"}
    grid = titled["patched"].collections[0].get_array()
    np.testing.assert_allclose(np.asarray(grid), np.asarray(figure.data[0].z, dtype=float))
    assert "Precision@1" in [axes.get_ylabel() for axes in paper.axes]


@pytest.mark.parametrize("readout", ["next_token", "generate", "choices"])
def test_every_figure_is_written_in_every_format(readout: str, tmp_path: Path) -> None:
    drawn = figures(make_table(readout, n_rows=3, layers=range(4), controls=CONTROLS))
    files = save_figures(drawn, tmp_path / "new")
    assert len(files) == 3 * len(drawn) == 6
    assert [file.suffix for file in files[:3]] == [".pdf", ".svg", ".png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    pdf = files[0].read_bytes()
    assert b"/FontFile2" in pdf  # TrueType, embedded
    assert b"/Type3" not in pdf
    svg = files[1].read_text(encoding="utf-8")
    assert "<text" not in svg  # letters are outlines
    assert "http" not in svg.split("<defs>", 1)[1].replace("http://www.w3.org/", "")


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    drawn = figures(make_table(n_rows=2, layers=range(3)))
    one, other = (save_figures(drawn, tmp_path / name) for name in "ab")
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]


def test_hostile_text_is_drawn(tmp_path: Path) -> None:
    table = make_table("generate", n_rows=2, layers=range(2))
    table["text"] = pd.Series(NASTY, index=table.index, dtype=object)
    table["source_prompt"] = pd.Series("$x^{$ " + NASTY, index=table.index, dtype=object)
    assert save_figures(figures(table), tmp_path, formats=["svg"])
    assert printable("a\U0010fffdb") == "a⟨U+10FFFD⟩b"


def test_wrong_formats_and_a_missing_matplotlib_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = figures(make_table(n_rows=1))
    with pytest.raises(InputError, match="Use some of pdf, svg, png"):
        save_figures(drawn, tmp_path, formats=["gif"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'patchscope-nn\[figures\]'"):
        save_figures(drawn, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_figure_with_failed_cells_is_drawn(tmp_path: Path) -> None:
    table = make_table(n_rows=2).assign(error=None)
    table.loc[5, "error"] = "RunError: it failed"
    assert len(save_figures(figures(table)[-1:], tmp_path, formats=("svg",))) == 1


def test_import_does_not_load_matplotlib() -> None:
    code = "import patchscope_nn.report.figures, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
