"""Figures hold the numbers of the table, its controls, and no markup of what a model said."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from drawn import (
    comparison_curve,
    figures,
    layer_curve,
    layer_pair_heatmap,
    text_heatmap,
    token_heatmap,
)
from tables import NASTY, make_table

from patchscope_nn.analysis.statistics import best_over, numbers
from patchscope_nn.errors import InputError
from patchscope_nn.report.figures.table import layer_means, metric_columns
from patchscope_nn.report.figures.text import shorten, text_width, visible


def names(figure: Any) -> set[str]:
    return {trace.name for trace in figure.data}


def test_curve_means_equal_pandas() -> None:
    table = make_table()
    figure = layer_curve(table, metric="precision_at_1")
    curve = next(trace for trace in figure.data if trace.name == "patched")
    expected = table[table["control"].isna()].groupby("source_layer")["precision_at_1"].mean()
    np.testing.assert_allclose(curve.y, expected.to_numpy())
    np.testing.assert_array_equal(curve.x, expected.index)


def test_curve_draws_every_control_and_unpatched_across() -> None:
    table = make_table(controls=("unpatched", "random", "shuffled"), layers=range(-1, 11))
    figure = layer_curve(table, metric="precision_at_1")
    controls = {f"{name} (control)" for name in ("unpatched", "random", "shuffled")}
    assert names(figure) == controls | {"patched", "95 % interval"}
    flat = next(trace for trace in figure.data if trace.name == "unpatched (control)")
    assert set(flat.y) == {table[table["control"] == "unpatched"]["precision_at_1"].mean()}
    assert min(flat.x) == -1
    assert max(flat.x) == 10
    assert all(trace.line.dash != "solid" for trace in figure.data if trace.name in controls)
    assert "embed" in figure.layout.xaxis.ticktext


def test_band_holds_the_mean_is_seeded_and_draws_rows() -> None:
    table = make_table("generate")
    means = layer_means(table, metric="rouge_l")
    assert (means["low"] <= means["mean"]).all()
    assert (means["mean"] <= means["high"]).all()
    pd.testing.assert_frame_equal(means, layer_means(table, metric="rouge_l"))
    doubled = pd.concat([table, table])  # the same rows twice are no new evidence
    twice = layer_means(doubled, metric="rouge_l").drop(columns="n_cells")
    pd.testing.assert_frame_equal(means.drop(columns="n_cells"), twice)


def test_one_row_has_no_band() -> None:
    table = make_table(n_rows=1)
    assert "95 % interval" not in names(layer_curve(table, metric="precision_at_1"))


def test_the_best_over_target_layers_is_a_curve_with_its_controls() -> None:
    table = make_table(n_rows=6, layers=range(4), target_layers=range(5))
    (title, figure), *_ = figures(table, metrics=["precision_at_1"], best=["target_layer"])
    assert title.endswith("best over target layer")
    best = best_over(table, metric="precision_at_1", over=["target_layer"])
    for name, chosen in (
        ("patched", best["control"].isna()),
        ("random (control)", best["control"] == "random"),
    ):
        curve = next(trace for trace in figure.data if trace.name == name)
        expected = best[chosen].groupby("source_layer")["precision_at_1"].mean()
        np.testing.assert_allclose(curve.y, expected.to_numpy())
    (_, by_target), *_ = figures(table, metrics=["precision_at_1"], best=["source_layer"])
    assert by_target.layout.xaxis.title.text == "target layer"
    assert len(next(trace for trace in by_target.data if trace.name == "patched").y) == 5


def test_the_best_over_all_layers_is_a_point_for_each_kind() -> None:
    table = make_table(n_rows=6, layers=range(4), target_layers=range(5))
    over = ["source_layer", "target_layer"]
    (_, figure), *_ = figures(table, metrics=["precision_at_1"], best=over)
    best = best_over(table, metric="precision_at_1", over=over)
    assert names(figure) == {"patched", "random (control)", "unpatched (control)"}
    random = next(trace for trace in figure.data if trace.name == "random (control)")
    assert random.y[0] == pytest.approx(best[best["control"] == "random"]["precision_at_1"].mean())
    assert random.error_y.array[0] >= 0


def test_runs_are_compared_in_one_figure() -> None:
    tables = {
        name: make_table(n_rows=6, layers=range(4), seed=seed) for seed, name in enumerate(("a", "<b>"))
    }
    means = [
        layer_means(table, metric="precision_at_1").assign(run=name, metric="precision_at_1")
        for name, table in tables.items()
    ]
    figure = comparison_curve(pd.concat(means), metric="precision_at_1", names=list(tables))
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert set(lines) == {
        *("a", "a: random (control)", "a: unpatched (control)"),
        *("&lt;b&gt;", "&lt;b&gt;: random (control)", "&lt;b&gt;: unpatched (control)"),
    }
    real = tables["<b>"][tables["<b>"]["control"].isna()]
    np.testing.assert_allclose(lines["&lt;b&gt;"].y, real.groupby("source_layer")["precision_at_1"].mean())
    assert [name for name, line in lines.items() if line.line.dash == "solid"] == ["a", "&lt;b&gt;"]
    assert len({line.line.color for line in lines.values()}) == 2
    assert len(lines["a: unpatched (control)"].x) == 4


def test_text_only_has_a_line_of_its_own() -> None:
    table = make_table(controls=("unpatched", "random", "shuffled", "text-only"), n_rows=4)
    lines = {trace.name: trace.line for trace in layer_curve(table, metric="precision_at_1").data}
    looks = {name: (line.color, line.dash) for name, line in lines.items() if name != "95 % interval"}
    assert "text-only (control)" in looks
    assert len(set(looks.values())) == len(looks) == 5
    best = best_over(table, metric="precision_at_1", over=["source_layer", "target_layer"])
    assert set(best["control"].dropna()) == {"unpatched", "random", "shuffled", "text-only"}
    (_, points), *_ = figures(table, metrics=["precision_at_1"], best=["source_layer", "target_layer"])
    colours = {trace.name: trace.marker.color for trace in points.data}
    assert colours["text-only (control)"] == lines["text-only (control)"].color
    columns = list(text_heatmap(table).layout.xaxis.ticktext) + list(
        text_heatmap(table).layout.yaxis.ticktext
    )
    assert "text-only" in columns


def test_scales_are_panels_and_samples_are_averaged() -> None:
    table = make_table(n_rows=4, layers=range(5), scales=(0.5, 2.0), samples=3)
    figure = layer_curve(table, metric="surprisal_nats")
    assert [note.text for note in figure.layout.annotations] == ["scale 0.5", "scale 2"]
    assert "noise samples" in figure.layout.title.text
    real = table[table["control"].isna()]
    for scale, axis in ((0.5, "x"), (2.0, "x2")):
        curve = next(one for one in figure.data if one.name == "patched" and one.xaxis == axis)
        expected = real[real["scale"] == scale].groupby("source_layer")["surprisal_nats"].mean()
        np.testing.assert_allclose(curve.y, expected.to_numpy())
        assert any(one.name == "unpatched (control)" and one.xaxis == axis for one in figure.data)
    words = text_heatmap(table)
    assert "first of 3 samples" in words.layout.title.text
    assert sum(str(line).endswith(" x 2") for line in words.layout.yaxis.ticktext) == 4 * 2


def test_tokens_by_layers_are_drawn_with_their_controls() -> None:
    controls = ("unpatched", "random", "text-only")
    table = make_table(n_rows=2, layers=range(4), positions=range(5), controls=controls, samples=2)
    titles = [title for title, _ in figures(table, metrics=["surprisal_nats"])]
    assert sum("by token and layer" in title for title in titles) == 2
    figure = token_heatmap(table, metric="surprisal_nats", row=1)
    assert [note.text for note in figure.layout.annotations] == ["patched", "random (control)"]
    columns = list(figure.layout.xaxis.ticktext)
    assert columns[:3] == ["text-only", "unpatched", "0"]
    real = table[(table["row"] == 1) & table["control"].isna()]
    expected = real.assign(at=[place[0] for place in real["source_position"]]).pivot_table(
        index="at", columns="source_layer", values="surprisal_nats"
    )
    np.testing.assert_allclose(np.asarray(figure.data[0].z, dtype=float)[:, 2:], expected.to_numpy())
    unpatched = table[(table["row"] == 1) & (table["control"] == "unpatched")]["surprisal_nats"].mean()
    np.testing.assert_allclose(np.asarray(figure.data[0].z, dtype=float)[:, 1], [unpatched] * 5)
    assert figure.layout.coloraxis.cmax == pytest.approx(expected.to_numpy().max())


def test_a_probes_controls_are_lines_of_one_figure() -> None:
    table = make_table("generate", controls=(), n_rows=6).drop(columns=["text", "stopped", "rouge_l"])
    table = table.assign(probe_accuracy=1.0, probe_majority_accuracy=0.25, probe_shuffled_accuracy=0.5)
    ((_, figure),) = figures(table)
    lines = {trace.name: trace for trace in figure.data}
    assert set(lines) >= {"patched", "commonest class (control)", "shuffled labels (control)"}
    assert set(lines["commonest class (control)"].y) == {0.25}


def test_ranks_that_span_much_are_drawn_by_their_logarithm() -> None:
    table = make_table(n_rows=2).assign(rank=1.0)
    assert layer_curve(table, metric="rank").layout.yaxis.type is None
    table.loc[table["control"] == "random", "rank"] = 4000.0
    assert layer_curve(table, metric="rank").layout.yaxis.type == "log"


def test_layer_pairs_become_a_heatmap_with_controls() -> None:
    table = make_table(n_rows=3, layers=range(4), target_layers=range(5))
    figure = layer_curve(table, metric="precision_at_1")
    patched = next(trace for trace in figure.data if trace.type == "heatmap")
    real = table[table["control"].isna()]
    expected = real.pivot_table(index="target_layer", columns="source_layer", values="precision_at_1")
    np.testing.assert_allclose(np.asarray(patched.z), expected.to_numpy())
    panels = [note.text for note in figure.layout.annotations]
    assert panels == ["patched", "random (control)"]
    assert "unpatched (control)" in figure.layout.title.text
    assert len(layer_pair_heatmap(table, metric="precision_at_1").data) == 2


def test_one_source_layer_is_drawn_by_target_layer() -> None:
    figure = layer_curve(make_table(n_rows=3, layers=[5], target_layers=range(6)), metric="precision_at_1")
    assert figure.layout.xaxis.title.text == "target layer"
    assert len(next(trace for trace in figure.data if trace.name == "patched").x) == 6


@pytest.mark.parametrize("readout", ["next_token", "choices", "generate"])
def test_text_heatmap_shows_words_with_unpatched_on_top(readout: str) -> None:
    table = make_table(readout, n_rows=5)
    if readout == "generate":
        table.loc[table["control"] == "unpatched", "rouge_l"] = 0.25
    figure = text_heatmap(table)
    lines = list(figure.layout.yaxis.ticktext)
    assert lines[0] == "unpatched"
    assert len(lines) == 1 + 2 * 5
    assert sum(line.startswith("random:") for line in lines) == 5
    assert figure.layout.coloraxis.colorbar.title.text in {"probability", "rouge_l"}
    filled = [np.isfinite(np.asarray(heatmap.z, dtype=float)) for heatmap in figure.data]
    assert (np.sum(filled, axis=0) == 1).all()
    assert any("layer 3" in heatmap.hovertext[1][3] for heatmap in figure.data)


def test_text_heatmap_shows_where_a_description_begins() -> None:
    table = make_table("generate", controls=(), n_rows=1, layers=[0, 1])
    table["text"] = [": Country in the United Kingdom, China", ": "]
    words = [word for heatmap in text_heatmap(table).data for word in np.ravel(heatmap.text) if word]
    assert words == ["Country in the Unit…", "(empty)"]


def test_text_heatmap_overlooks_rounding_of_the_unpatched_cells() -> None:
    table = make_table(controls=("unpatched",), n_rows=3, layers=range(3))
    table["top_probs"] = [[0.3090255 + 1e-7 * (i % 2), 0.01] for i in range(len(table))]
    figure = text_heatmap(table)
    assert figure.layout.yaxis.ticktext[0] == "unpatched"


def test_text_heatmap_puts_differing_unpatched_cells_beside() -> None:
    table = make_table(n_rows=3)
    table["target_prompt"] = [f"target {row}: ?" for row in table["row"]]
    unpatched = table["control"] == "unpatched"
    table.loc[unpatched, "top_probs"] = pd.Series([[0.1 * (1 + i), 0.01] for i in range(len(table))])
    figure = text_heatmap(table)
    assert figure.layout.xaxis.ticktext[0] == "unpatched"
    assert "unpatched" not in figure.layout.yaxis.ticktext


def test_text_heatmap_names_tokens_when_one_prompt_has_many() -> None:
    figure = text_heatmap(make_table(n_rows=1, positions=range(6), controls=()))
    assert list(figure.layout.yaxis.ticktext)[:2] == ["Paris (0)", "the (1)"]
    assert any("attention sink" in heatmap.hovertext[0][0] for heatmap in figure.data)
    assert not any("attention sink" in heatmap.hovertext[1][0] for heatmap in figure.data)


def test_text_heatmap_is_capped_and_says_so() -> None:
    figure = text_heatmap(make_table(n_rows=50, layers=range(2)))
    assert "first 40 of 50 rows" in figure.layout.title.text
    assert len(figure.layout.yaxis.ticktext) == 41


def test_failed_cells_are_crosses() -> None:
    table = make_table(n_rows=2)
    table["error"] = ["CUDA <oom>" if i == 3 else None for i in range(len(table))]
    table["top_tokens"] = [None if i == 3 else words for i, words in enumerate(table["top_tokens"])]
    cross = text_heatmap(table).data[-1]
    assert cross.marker.symbol == "x-thin"
    assert "CUDA &lt;oom&gt;" in cross.hovertext[0]


def test_hostile_text_is_escaped_and_short() -> None:
    table = make_table("generate", n_rows=2, layers=range(3))
    table["text"] = pd.Series(NASTY, index=table.index, dtype=object)
    table["source_prompt"] = pd.Series(NASTY, index=table.index, dtype=object)
    table["source_token"] = [[NASTY] for _ in range(len(table))]
    figure = text_heatmap(table)
    shown = figure.to_json().replace("<br>", "")
    assert "<" not in shown.replace("<extra></extra>", "")
    assert not any(ord(character) < 32 for character in json.loads(figure.to_json())["data"][0]["text"][0][0])
    for trace in figure.data:
        for labels, hovers in zip(trace.text, trace.hovertext, strict=True):
            assert all(len(label) <= 60 for label in labels)
            assert all(len(hover) < 2500 for hover in hovers)


def test_parquet_round_trip_draws_the_same(tmp_path: Path) -> None:
    table = make_table(n_rows=3)
    table.to_parquet(tmp_path / "cells.parquet")
    again = pd.read_parquet(tmp_path / "cells.parquet")
    for (title, before), (other, after) in zip(
        figures(table, metrics=["precision_at_1"]), figures(again, metrics=["precision_at_1"]), strict=True
    ):
        assert title == other
        assert before.to_json() == after.to_json()


@pytest.mark.parametrize("readout", ["next_token", "generate", "choices"])
def test_figures_leave_the_table_alone(readout: str) -> None:
    table = make_table(readout, n_rows=3)
    copy = table.copy(deep=True)
    drawn = figures(table, metrics=metric_columns(table))
    assert len(drawn) == 2
    assert all(title and figure.data for title, figure in drawn)
    pd.testing.assert_frame_equal(table, copy)


def test_declared_metrics_come_first() -> None:
    table = make_table(n_rows=2)
    assert metric_columns(table) == ["precision_at_1"]
    declared = ["surprisal_nats", "precision_at_1", "absent"]
    assert metric_columns(table, declared=declared) == ["surprisal_nats", "precision_at_1"]


def test_a_table_without_results_has_no_figures() -> None:
    table = make_table("generate", n_rows=1, layers=range(2))
    assert figures(table.iloc[:0]) == []
    table["text"] = None
    table["rouge_l"] = np.nan
    assert figures(table) == []


def test_wrong_columns_are_named() -> None:
    table = make_table(n_rows=1)
    with pytest.raises(InputError, match=r"metric='bleu' is not a column.*precision_at_1"):
        layer_curve(table, metric="bleu")
    with pytest.raises(InputError, match="value='bleu' is not a column"):
        text_heatmap(table, value="bleu")
    with pytest.raises(InputError, match="no text"):
        text_heatmap(table.drop(columns="top_tokens"))


def test_missing_plotly_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match=r"pip install 'patchscope-nn\[report\]'"):
        layer_curve(make_table(n_rows=1), metric="precision_at_1")


def test_import_does_not_load_plotly() -> None:
    code = "import patchscope_nn.report.figures, sys; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a\nb", "a⏎b"),
        ("\t", "⇥"),
        ("\x00", "␀"),
        ("\x9b", "⟨U+009B⟩"),
        ("\u202e", "⟨U+202E⟩"),
        ("\ud800", "\ufffd"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("שלום", "שלום"),
        (None, ""),
    ],
)
def test_visible(given: str | None, expected: str) -> None:
    assert visible(given) == expected


def test_shorten_counts_columns_and_keeps_either_end() -> None:
    assert shorten("abcdefgh", width=5) == "abcd…"
    assert shorten("abcdefgh", width=5, tail=True) == "…efgh"
    assert text_width(shorten("東京" * 10, width=12)) <= 12
    assert shorten("abc", width=12) == "abc"
    assert len(shorten("e" + "\u0301" * 10_000, width=12)) <= 50


def test_numbers_take_what_a_table_may_hold() -> None:
    given = pd.Series([1, True, None, pd.NA, "x", [1.0], np.float32(2)], dtype=object)
    np.testing.assert_array_equal(numbers(given), [1, 1, np.nan, np.nan, np.nan, np.nan, 2])
    np.testing.assert_array_equal(numbers(pd.Series([1, None], dtype="Int64")), [1, np.nan])
