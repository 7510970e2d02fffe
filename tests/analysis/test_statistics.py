"""Statistics against scipy, against brute force, and on tables where the answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tables import make_table

from patchscope_nn.analysis import statistics
from patchscope_nn.analysis.statistics import best_over, intervals, layer_means, paired, paired_t, summarise

GENERATOR = np.random.default_rng(3)


def test_the_interval_is_that_of_scipy_where_every_row_has_one_cell():
    value = GENERATOR.normal(1.0, 2.0, size=60)
    found = intervals(value, row=range(60), draws=20_000)
    expected = stats.bootstrap(
        (value,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.mean[0] == pytest.approx(value.mean())
    assert (found.low[0], found.high[0]) == pytest.approx(expected, abs=0.02)


@pytest.mark.quick
def test_cells_of_a_row_are_drawn_together():
    value = np.repeat(GENERATOR.normal(size=20), 50)  # fifty cells of a row that all say the same
    row = np.repeat(np.arange(20), 50)
    together, alone = intervals(value, row=row), intervals(value, row=np.arange(1000))
    once = intervals(value[::50], row=np.arange(20))
    assert (together.n_rows[0], together.n_cells[0]) == (20, 1000)
    assert together.high[0] - together.low[0] == pytest.approx(once.high[0] - once.low[0])
    assert together.high[0] - together.low[0] > 5 * (alone.high[0] - alone.low[0])


def test_of_many_rows_the_normal_interval_is_that_of_the_bootstrap(monkeypatch):
    """Rows of one to three cells in two groups, which are alike within a row."""
    generator = np.random.default_rng(5)
    row = np.repeat(np.arange(6000), generator.integers(1, 4, 6000))
    value = (generator.exponential(size=6000) + generator.normal(size=6000))[row]
    group = generator.integers(0, 2, len(row))
    normal = intervals(value, row=row, group=group)
    monkeypatch.setattr(statistics, "_MANY_ROWS", 10_000)
    drawn = intervals(value, row=row, group=group)
    width = drawn.high - drawn.low
    np.testing.assert_array_less(np.abs(normal.low - drawn.low), 0.06 * width)
    np.testing.assert_array_less(np.abs(normal.high - drawn.high), 0.06 * width)
    np.testing.assert_array_equal(normal.mean, drawn.mean)
    alone = intervals(value, row=row, group=np.where(row == 7, 1, 0))
    assert np.isnan([alone.low[1], alone.high[1]]).all()


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator, hits = np.random.default_rng(0), 0
    for _ in range(200):
        effect = generator.normal(size=(40, 1)) + generator.normal(size=(40, 3))
        found = intervals(effect.ravel(), row=np.repeat(np.arange(40), 3), draws=400)
        hits += bool(found.low[0] <= 0 <= found.high[0])
    assert 0.88 <= hits / 200 <= 0.99


def test_groups_have_their_own_means_and_a_single_row_has_no_interval():
    found = intervals([1.0, 3.0, 5.0], row=[0, 1, 1], group=[0, 0, 1])
    assert found.mean.tolist() == [2.0, 5.0]
    assert found.n_rows.tolist() == [2, 1]
    assert np.isnan(found.low[1])
    assert np.isnan(found.high[1])


@settings(max_examples=30)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8))
def test_few_rows_are_flipped_in_every_way(sums):
    flipped = [np.dot(signs, sums) for signs in itertools.product((1, -1), repeat=len(sums))]
    at_least = np.mean([abs(one) >= abs(sum(sums)) - 1e-9 for one in flipped])
    assert paired(np.array(sums, float), row=range(len(sums))).p == pytest.approx(at_least)


@pytest.mark.parametrize("noise", [0.0, 1e-7, -1e-7])
def test_rounding_does_not_tell_equally_extreme_patterns_apart(noise):
    """Other patterns of signs also have the sum 2 or -2, but for the last digits."""
    sums = np.array([1 + noise, -2, 3 - noise, -4 + 2 * noise])
    flipped = [np.dot(signs, [1, 2, 3, 4]) for signs in itertools.product((1, -1), repeat=4)]
    expected = np.mean(np.abs(flipped) >= 2)
    assert paired(sums, row=range(4)).p == pytest.approx(expected)


def test_many_rows_are_flipped_at_random_and_agree_with_the_t_test():
    value = GENERATOR.normal(0.25, 1.0, size=80)
    found = paired(value, row=range(80))
    assert found.p == pytest.approx(stats.ttest_1samp(value, 0).pvalue, abs=0.01)
    assert found == paired(value, row=range(80))
    assert paired(GENERATOR.normal(2.0, 1.0, size=80), row=range(80)).p < 0.001


def test_a_row_counts_once_however_many_cells_it_has():
    value, row = np.tile([1.0, 1.0, 1.0], 40), np.repeat([0, 1, 2], 40)
    assert paired(value, row=row).p == pytest.approx(0.25)  # 2 of 8 patterns of signs


@pytest.mark.parametrize("rows", [0, 1])
def test_no_test_without_rows(rows):
    found = paired(np.ones(rows), row=range(rows))
    assert found.n_pairs == rows
    assert np.isnan([found.low, found.high, found.p]).all()


def test_the_papers_test_is_scipys_with_its_correction():
    first, second = GENERATOR.normal(0.6, 0.1, size=27), GENERATOR.normal(0.5, 0.1, size=27)
    found = paired_t(first, second, tests=12)
    t, p = stats.ttest_rel(first, second)
    assert (found.n_layers, found.t, found.p) == (27, pytest.approx(t), pytest.approx(p))
    assert found.p_bonferroni == pytest.approx(min(1, 12 * p))
    assert paired_t(second, second + 0.1).n_layers == 27
    assert np.isnan(paired_t(second, second).t)
    assert np.isnan(paired_t([0.1], [0.2]).t)


def test_layer_means_equal_pandas():
    table = make_table(layers=range(3), target_layers=range(2), controls=("unpatched", "shuffled"))
    means = layer_means(table, metric="precision_at_1")
    assert len(means) == 2 * 3 * 2 + 1
    expected = table[table["control"] == "shuffled"].groupby(["source_layer", "target_layer"])
    ours = means[means["control"] == "shuffled"].set_index(["source_layer", "target_layer"])["mean"]
    np.testing.assert_allclose(ours.to_numpy(), expected["precision_at_1"].mean().to_numpy())
    assert set(means["n_cells"]) == {20}


CROSSED = make_table(n_rows=6, layers=range(3), target_layers=range(4), controls=("unpatched", "random"))


@pytest.mark.parametrize("over", [["target_layer"], ["source_layer"], ["source_layer", "target_layer"]])
@pytest.mark.parametrize("metric", ["precision_at_1", "surprisal_nats"])
def test_the_best_is_taken_of_controls_too(over, metric):
    found = best_over(CROSSED, metric=metric, over=over)
    kept = [name for name in ("source_layer", "target_layer") if name not in over]
    best = "min" if metric == "surprisal_nats" else "max"
    for control in (None, "random"):
        own = CROSSED[CROSSED["control"].isna() if control is None else CROSSED["control"] == control]
        expected = own.groupby(["row", *kept])[metric].agg([best, "size"])
        ours = found[found["control"].isna() if control is None else found["control"] == control]
        ours = ours.set_index(["row", *kept]).loc[expected.index]
        np.testing.assert_allclose(ours[metric], expected[best])
        assert ours["n_best"].tolist() == expected["size"].tolist()
        assert ours[over].isna().all(axis=None)
    unpatched = found[found["control"] == "unpatched"]
    np.testing.assert_allclose(unpatched[metric], CROSSED[CROSSED["control"] == "unpatched"][metric])


def test_the_best_is_over_the_same_cells():
    table = CROSSED.copy()
    table["precision_at_1"] = 0.0
    failed = (table["control"] == "random") & (table["row"] == 2) & (table["source_layer"] == 1)
    table.loc[failed & (table["target_layer"] == 3), "precision_at_1"] = np.nan
    real = table["control"].isna() & (table["row"] == 2) & (table["source_layer"] == 1)
    table.loc[real & (table["target_layer"] == 3), "precision_at_1"] = 1.0
    found = best_over(table, metric="precision_at_1", over=["source_layer", "target_layer"])
    found = found[(found["row"] == 2) & (found["control"] != "unpatched")]
    assert found["n_best"].tolist() == [11, 11]
    assert found["precision_at_1"].tolist() == [0.0, 0.0]


def test_the_best_over_positions_stays_apart():
    table = make_table(n_rows=2, layers=range(3), positions=(1, 2), controls=("random",))
    found = best_over(table, metric="precision_at_1", over=["source_layer", "target_layer"])
    assert len(found) == 2 * 2 * 2
    assert set(found["n_best"]) == {3}


def test_summary_is_tidy_and_takes_the_best():
    plain = summarise(CROSSED, metrics=["precision_at_1", "surprisal_nats"])
    assert len(plain) == 2 * (2 * 12 + 1)
    best = summarise(CROSSED, metrics=["precision_at_1"], best=["target_layer"])
    assert len(best) == 2 * 3 + 1
    assert best["target_layer"].isna().all()
    highest = plain[plain["metric"] == "precision_at_1"].groupby("control")["mean"].max()
    assert (best.groupby("control")["mean"].max() >= highest - 1e-12).all()
    empty = summarise(CROSSED.assign(precision_at_1=None), metrics=["precision_at_1"])
    assert list(empty) == list(plain)
    assert empty.empty
    pd.testing.assert_frame_equal(plain, summarise(CROSSED, metrics=["precision_at_1", "surprisal_nats"]))


@pytest.mark.parametrize("best", [[], ["target_layer"], ["source_layer", "target_layer"]])
def test_scales_stay_apart(best):
    sizes = {"n_rows": 4, "layers": range(3), "target_layers": range(2)}
    table = make_table(**sizes, controls=("unpatched", "random", "text-only"), scales=(0.5, 2.0))
    found = summarise(table, metrics=["precision_at_1"], best=best)
    assert set(found.loc[found["control"].isin(["unpatched", "text-only"]), "scale"].isna()) == {True}
    for scale in (0.5, 2.0):
        alone = table[(table["scale"] == scale) & ~table["control"].isin(["unpatched", "text-only"])]
        expected = summarise(alone, metrics=["precision_at_1"], best=best)
        assert "scale" not in expected
        own = found[found["scale"] == scale].drop(columns="scale").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, expected, check_dtype=False)
    assert set(found["scale"].dropna()) == {0.5, 2.0}


def test_a_metric_of_controls_alone_has_a_column_of_scales_too():
    table = make_table(n_rows=2, layers=range(2), scales=(0.5, 2.0))
    table["precision_at_1"] = table["precision_at_1"].where(table["control"] == "unpatched")
    found = summarise(table, metrics=["precision_at_1"])
    assert len(found) == 1
    assert found["scale"].isna().all()
