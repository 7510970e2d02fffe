"""Comparing runs: which cells are pairs, and what is said of their differences."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tables import make_table

from patchscope_nn.analysis.comparison import ComparedRun, compare
from patchscope_nn.analysis.statistics import best_over, paired
from patchscope_nn.errors import InputError

METRIC = "surprisal_nats"


def one(name, table, **more):
    return ComparedRun(**{"name": name, "table": table, "metrics": (METRIC,), "data": "same"} | more)


def line(comparison, first, second, *, controls=("patched", "patched")):
    found = comparison.differences
    chosen = (found["first"] == first) & (found["second"] == second)
    chosen &= (found["first_control"] == controls[0]) & (found["second_control"] == controls[1])
    (only,) = found[chosen].to_dict("records")
    return only


def real(table, control=None):
    return table[table["control"].isna() if control is None else table["control"] == control]


def test_the_difference_is_that_of_the_same_cells():
    table = make_table(layers=range(4))
    other = table.assign(**{METRIC: table[METRIC] + 0.5 + 0.1 * table["row"]})
    shuffled = other.sample(frac=1, random_state=1)
    found = line(compare([one("a", table), one("b", shuffled)]), "a", "b")
    assert found["n_pairs"] == 20 * 4
    assert found["n_rows"] == 20
    assert found["mean"] == pytest.approx(0.5 + 0.1 * 9.5)
    assert found["low"] < found["mean"] < found["high"]
    difference = real(other)[METRIC].to_numpy() - real(table)[METRIC].to_numpy()
    assert found["p"] == paired(difference, row=real(table)["row"]).p
    assert (found["first_unpaired"], found["second_unpaired"]) == (0, 0)


def test_controls_are_compared_too_and_each_run_with_its_own():
    table = make_table(layers=range(4), controls=("unpatched", "random"))
    found = compare([one("a", table), one("b", table)])
    assert line(found, "a", "b", controls=("random", "random"))["mean"] == 0
    assert line(found, "a", "b", controls=("unpatched", "unpatched"))["n_pairs"] == 20
    own = line(found, "a", "a", controls=("random", "patched"))
    expected = real(table)[METRIC].mean() - real(table, "random")[METRIC].mean()
    assert own["mean"] == pytest.approx(expected)
    against = line(found, "a", "a", controls=("unpatched", "patched"))
    assert against["n_pairs"] == 80  # the unpatched value of a row stands beside all its cells
    unpatched = real(table, "unpatched").set_index("row")[METRIC]
    expected = (real(table)[METRIC] - unpatched.loc[real(table)["row"]].to_numpy()).mean()
    assert against["mean"] == pytest.approx(expected)
    assert len(found.between()) == 3


def test_the_papers_test_is_over_layers_and_corrected():
    table = make_table(layers=range(6))
    other = make_table(layers=range(6), seed=1)
    third = make_table(layers=range(6), seed=2)
    found = line(compare([one("a", table), one("b", other), one("c", third)]), "a", "b")
    means = [real(each).groupby("source_layer")[METRIC].mean() for each in (other, table)]
    t, p = stats.ttest_rel(*means)
    assert (found["n_layers"], found["t"], found["p_t"]) == (6, pytest.approx(t), pytest.approx(p))
    assert found["p_bonferroni"] == pytest.approx(min(1, 2 * p))  # two runs against the first, one metric


def test_a_lens_and_a_sweep_of_the_diagonal_meet_at_the_source_layer():
    identity = make_table(layers=range(4))
    lens = make_table(layers=range(4), target_layers=[11], seed=1)
    found = line(compare([one("identity", identity), one("lens", lens)]), "identity", "lens")
    assert (found["n_pairs"], found["first_unpaired"], found["second_unpaired"]) == (80, 0, 0)
    expected = real(lens)[METRIC].to_numpy() - real(identity)[METRIC].to_numpy()
    assert found["mean"] == pytest.approx(expected.mean())


def test_crossed_layers_meet_a_diagonal_where_both_have_been():
    crossed = make_table(n_rows=3, layers=range(4), target_layers=range(4))
    diagonal = make_table(n_rows=3, layers=range(4), seed=1)
    compared = compare([one("crossed", crossed), one("diagonal", diagonal)])
    found = line(compared, "crossed", "diagonal")
    assert (found["n_pairs"], found["first_unpaired"], found["second_unpaired"]) == (12, 36, 0)
    on = real(crossed)[real(crossed)["source_layer"] == real(crossed)["target_layer"]]
    layers = compared.layers.query("run == 'crossed' and control == 'patched'")
    assert layers["source_layer"].tolist() == [0, 1, 2, 3]
    assert layers["mean"].tolist() == pytest.approx(
        real(crossed).groupby("source_layer")[METRIC].mean().tolist()
    )
    assert found["mean"] == pytest.approx((real(diagonal)[METRIC].to_numpy() - on[METRIC].to_numpy()).mean())


def test_layers_that_only_one_has_are_counted():
    found = line(
        compare([one("a", make_table(layers=range(4))), one("b", make_table(layers=range(2, 9)))]), "a", "b"
    )
    assert (found["n_pairs"], found["first_unpaired"], found["second_unpaired"]) == (40, 40, 100)


def test_single_layers_that_differ_are_compared():
    found = line(compare([one("5", make_table(layers=[5])), one("8", make_table(layers=[8]))]), "5", "8")
    assert found["n_pairs"] == 20


def test_positions_tell_cells_apart():
    table = make_table(n_rows=4, layers=range(2), positions=(1, 2, 3))
    other = table.assign(
        **{METRIC: table[METRIC] + np.array([place[0] if place else 0 for place in table["source_position"]])}
    )
    found = line(compare([one("a", table), one("b", other.iloc[::-1])]), "a", "b")
    assert (found["n_pairs"], found["mean"]) == (24, pytest.approx(2.0))


def test_other_data_is_paired_by_prompt():
    table = make_table(n_rows=6, layers=range(2))
    fewer = table[table["row"] < 3].assign(**{METRIC: lambda cells: cells[METRIC] + 1})
    found = line(compare([one("a", table), one("b", fewer, data="other")]), "a", "b")
    assert (found["n_pairs"], found["n_rows"], found["mean"]) == (6, 3, pytest.approx(1.0))
    assert found["first_unpaired"] == 6
    foreign = table.assign(source_prompt="another prompt")
    with pytest.raises(InputError, match="no cell of b has a partner in a"):
        compare([one("a", table), one("b", foreign, data="other")])


def test_failed_cells_have_no_pair():
    table = make_table(n_rows=3, layers=range(2))
    other = table.copy()
    other.loc[other["control"].isna() & (other["row"] == 1), METRIC] = None
    found = line(compare([one("a", table), one("b", other)]), "a", "b")
    assert (found["n_pairs"], found["n_rows"], found["first_unpaired"]) == (4, 2, 2)


def test_the_best_is_compared_with_the_best():
    table, other = (
        make_table(n_rows=8, layers=range(3), target_layers=range(4), controls=("random",), seed=seed)
        for seed in (0, 1)
    )
    over = ("source_layer", "target_layer")
    found = compare([one("a", table, best=over), one("b", other, best=over)])
    best = [best_over(each, metric=METRIC, over=over) for each in (table, other)]
    expected = real(best[1])[METRIC].to_numpy() - real(best[0])[METRIC].to_numpy()
    assert line(found, "a", "b")["mean"] == pytest.approx(expected.mean())
    own = line(found, "a", "a", controls=("random", "patched"))
    assert own["n_pairs"] == 8
    assert own["mean"] == pytest.approx(real(best[0])[METRIC].mean() - real(best[0], "random")[METRIC].mean())
    half = compare([one("a", table, best=("target_layer",)), one("b", other, best=("target_layer",))])
    assert line(half, "a", "b")["n_pairs"] == 8 * 3
    assert line(half, "a", "b")["n_layers"] == 3


def test_a_score_compares_metrics_of_other_names():
    table = make_table(layers=range(3))
    renamed = table.rename(columns={METRIC: "probe_accuracy"})
    runs = [
        one("a", table, score=METRIC),
        one("b", renamed, metrics=("probe_accuracy",), score="probe_accuracy"),
    ]
    found = compare(runs)
    assert found.metrics == ("score",)
    assert line(found, "a", "b")["mean"] == 0
    with pytest.raises(InputError, match=r"share no metric \(a: surprisal_nats; b: probe_accuracy\)"):
        compare([one("a", table), one("b", renamed, metrics=("probe_accuracy",))])


def test_it_takes_two():
    table = make_table(n_rows=2)
    for runs in ([], [one("a", table)], [one("a", table), one("a", table)]):
        with pytest.raises(InputError, match="cannot be compared"):
            compare(runs)


def test_records_are_json():
    table = make_table(n_rows=1, layers=range(2))
    found = compare([one("a", table), one("b", table)])
    plain = json.loads(json.dumps(found.records(), allow_nan=False))
    assert plain["runs"] == ["a", "b"]
    assert plain["differences"][0]["p"] is None  # of a single row
    means = pd.DataFrame(plain["means"])
    expected = real(table)[METRIC].mean()
    assert means[(means["run"] == "a") & (means["control"] == "patched")]["mean"].item() == pytest.approx(
        expected
    )
