"""Probes, against scikit-learn itself; and a recipe's probe over its finished cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import parts
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import patchscope_nn as ps
from patchscope_nn.analysis.probes import PROBE_COLUMNS, States, fold_of, probe, probe_columns
from patchscope_nn.errors import DataError, SpecError
from patchscope_nn.recipe import Recipe

GENERATOR = np.random.default_rng(0)
LABELS = ["red", "green", "blue"] * 20
PROMPTS = [f"prompt {number // 2}" for number in range(60)]  # two rows of each
CENTRES = {"red": 1.0, "green": 0.0, "blue": -1.0}
VECTORS = np.array([[CENTRES[one]] * 8 for one in LABELS]) + GENERATOR.normal(0, 1.0, size=(60, 8))


def states(**more):
    given = {
        "vectors": VECTORS,
        "label": np.asarray(LABELS, dtype=object),
        "fold": fold_of(PROMPTS, folds=3),
        "trains": np.full(60, fill_value=True),
    }
    return States(**given | more)


def test_a_probe_is_scikit_learns():
    folds = GroupKFold(3, shuffle=True, random_state=0)
    said = probe(states())
    for found, model in (
        (said.choice, make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))),
        (said.majority, DummyClassifier(strategy="most_frequent")),
    ):
        expected = cross_val_predict(model, VECTORS, LABELS, groups=PROMPTS, cv=folds)
        assert found.tolist() == expected.tolist()
    assert (said.choice == LABELS).mean() > 0.6
    assert (said.shuffled == LABELS).mean() < 0.5


def test_no_prompt_is_on_both_sides():
    dealt = pd.Series(fold_of(PROMPTS, folds=3))
    assert dealt.groupby(PROMPTS).nunique().eq(1).all()
    assert sorted(dealt.unique()) == [0, 1, 2]


def test_what_no_fold_saw_cannot_be_learnt_by_heart():
    """Each prompt has a class of its own: a probe that had seen it would know it."""
    labels = np.asarray(PROMPTS, dtype=object)
    vectors = np.eye(30)[np.arange(60) // 2]
    assert (probe(states(label=labels, vectors=vectors)).choice != labels).all()


def test_the_states_of_controls_are_not_trained_on():
    trains = np.full(120, fill_value=True)
    trains[60:] = False
    twice = states(
        vectors=np.concatenate([VECTORS, np.ones((60, 8))]),
        label=np.asarray(LABELS * 2, dtype=object),
        fold=np.tile(fold_of(PROMPTS, folds=3), 2),
        trains=trains,
    )
    assert probe(twice).choice[:60].tolist() == probe(states()).choice.tolist()


def test_a_fold_that_saw_one_class_says_it():
    label = np.asarray(["a"] * 59 + ["b"], dtype=object)
    fold = fold_of(PROMPTS, folds=3)
    said = probe(states(label=label))
    assert set(said.choice[fold == fold[59]]) == {"a"}


def test_columns_are_by_layer_and_none_where_there_is_no_state():
    rows = [
        {"row": row, "control": control, "source_layer": layer, "hidden": hidden}
        for row in range(60)
        for control, layer, hidden in (
            ("unpatched", None, None),
            (None, 0, [VECTORS[row].tolist()]),
            (None, 1, [GENERATOR.normal(size=8).tolist()]),
            ("random", 0, [GENERATOR.normal(size=8).tolist(), GENERATOR.normal(size=8).tolist()]),
        )
    ]
    found = pd.DataFrame(probe_columns(rows, labels=LABELS, prompts=PROMPTS, folds=3, seed=0))
    assert tuple(found) == PROBE_COLUMNS
    assert found.iloc[::4].isna().all(axis=None)
    expected = probe(states()).choice
    at = found.iloc[1::4]
    assert at["probe_choice"].tolist() == expected.tolist()
    assert at["probe_accuracy"].tolist() == (expected == LABELS).astype(float).tolist()
    means = [found.iloc[start::4]["probe_accuracy"].astype(float).mean() for start in (1, 2, 3)]
    assert means[0] > 0.6 > max(means[1:])


# As a recipe asks for it.

WORDS = ("Paris", "Diana", "city", "Tower", "Eiffel", "The")
ROWS = [{"text": f"{start} {word}", "word": word} for start in ("The", "a", "in", "of") for word in WORDS]


def recipe(model, **more):
    given = {
        "name": "probe",
        "title": "What can be read?",
        "model": str(model),
        "data": {"rows": ROWS},
        "source": {"prompt": "{text}"},
        "readout": "hidden",
        "controls": ["shuffled"],
        "probe": {"label": "word"},
    }
    return Recipe(**given | more)


def test_a_recipes_probe_widens_the_table(folder, tmp_path):
    run = ps.run(recipe(folder), out=tmp_path / "run")
    table = run.table()
    assert list(table)[-5:] == [*PROBE_COLUMNS, "error"]
    real = table[table["control"].isna()]
    labels = [ROWS[row]["word"] for row in real["row"]]
    assert real["probe_accuracy"].tolist() == [
        float(choice == label) for choice, label in zip(real["probe_choice"], labels, strict=True)
    ]
    at = real[real["source_layer"] == 2]
    vectors = np.array([state[0] for state in at["hidden"]], dtype=np.float32)
    dealt = fold_of([row["text"] for row in ROWS], folds=3)
    expected = np.empty(len(ROWS), dtype=object)
    for fold in range(3):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        model.fit(vectors[dealt != fold], np.array([row["word"] for row in ROWS])[dealt != fold])
        expected[dealt == fold] = model.predict(vectors[dealt == fold])
    assert at["probe_choice"].tolist() == expected.tolist()
    summary = run.summary()
    assert set(summary["metric"]) == set(PROBE_COLUMNS[1:])
    assert set(summary["control"]) == {"patched", "shuffled"}
    kept = pd.read_parquet(tmp_path / "run/cells.parquet")
    assert kept["probe_choice"].tolist() == table["probe_choice"].tolist()
    pd.testing.assert_frame_equal(ps.load_run(tmp_path / "run").table(), table)
    assert run.rows[-1] == list(run.rows)[-1]
    assert run.rows[1:3] == list(run.rows)[1:3]


def test_another_probe_computes_no_cell_again(folder, tmp_path):
    first = ps.run(recipe(folder), out=tmp_path / "run")
    before = parts.contents(tmp_path / "run")
    again = ps.run(recipe(folder, probe={"label": "word", "folds": 4}, seed=0), out=tmp_path / "run")
    assert parts.contents(tmp_path / "run") == before
    assert len(again.manifest["sessions"]) == 1
    assert again.manifest["recipe"]["probe"] == {"label": "word", "folds": 4}
    assert again.table()["probe_choice"].tolist() != first.table()["probe_choice"].tolist()
    without = ps.run(recipe(folder, probe=None), out=tmp_path / "run")
    assert "probe_choice" not in without.table()
    assert "probe_choice" not in ps.load_run(tmp_path / "run").table()


def test_a_finished_probe_is_read_back(folder, tmp_path, monkeypatch):
    first = ps.run(recipe(folder), out=tmp_path / "run")
    monkeypatch.setattr("patchscope_nn.runs.execute.probe_columns", None)  # a call would fail
    again = ps.run(recipe(folder), out=tmp_path / "run")
    pd.testing.assert_frame_equal(again.table(), first.table())
    assert len(again.manifest["sessions"]) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"readout": "generate"},
            "probe: reads hidden states, and the readout is generate; write readout: hidden",
        ),
        (
            {"target": {"prompt": "x", "layer": 3}},
            "probe: is trained on the source's own states; leave out target.prompt, target.layer",
        ),
        ({"mapping": "target_norm"}, "probe: is trained on the source's own states; leave out mapping"),
        ({"probe": {"label": "word", "folds": 1}}, "probe.folds: input should be greater than or equal to 2"),
        ({"score": "probe_acuracy"}, "score: 'probe_acuracy' is not a metric of this recipe. Did you mean"),
    ],
)
def test_a_probe_that_fits_not(more, message):
    with pytest.raises(SpecError) as caught:
        recipe("model", **more)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"probe": {"label": "wrd"}},
            "probe.label='wrd' is not a column of data row 0. Did you mean 'word'?",
        ),
        (
            {"data": {"rows": ROWS[:2]}},
            "probe.folds=3 needs as many different source prompts, and the data has 2.",
        ),
        ({"data": {"rows": ROWS[::6]}}, "probe.label: every data row has the class 'Paris'."),
    ],
)
def test_a_probe_that_cannot_be_trained_says_so_before_anything_runs(folder, tmp_path, more, message):
    with pytest.raises(DataError) as caught:
        ps.run(recipe(folder, **more), out=tmp_path / "run")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()
