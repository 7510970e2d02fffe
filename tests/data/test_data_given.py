"""Data that Python gives: frames, datasets and rows work; anything else is answered with what to give."""

from __future__ import annotations

import json
from collections import OrderedDict

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import patchscope_nn as ps
from patchscope_nn.data.given import as_data
from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.errors import DataError, InputError, SpecError
from patchscope_nn.fitting.trained.training import Training

ROWS = [{"text": "The Eiffel", "n": 1}, {"text": "the city", "n": 2}]
SCOPE = ps.Patchscope(source=ps.Source(prompt="{text}", layer=1), target=ps.Target(prompt="The city"))


class Frame(list):
    """What polars gives: its columns, and its rows only by a method."""

    columns = ("text", "n")

    def to_dicts(self):
        return ROWS


GOOD = {
    "rows": ROWS,
    "a tuple": tuple(ROWS),
    "a generator": (row for row in ROWS),
    "other mappings": [OrderedDict(row) for row in ROWS],
    "numbers of numpy": [row | {"n": np.int64(row["n"])} for row in ROWS],
    "pandas": pd.DataFrame(ROWS, index=[7, 7]),
    "polars": Frame(["text", "n"]),
    "pyarrow": pa.Table.from_pylist(ROWS),
    "datasets": datasets.Dataset.from_list(ROWS),
    "a stream of datasets": datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "what a recipe says": {"rows": ROWS},
    "a DataSpec": DataSpec(rows=ROWS),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_form_gives_the_same_rows(name):
    assert load_rows(as_data(GOOD[name])) == ROWS


@pytest.mark.parametrize("form", [pd.DataFrame, datasets.Dataset.from_list], ids=["pandas", "datasets"])
def test_a_run_takes_it(tiny_model, form):
    run = ps.run(SCOPE, model=tiny_model(), data=form(ROWS))
    assert list(run.table()["source_prompt"]) == ["The Eiffel", "the city"]


def test_a_stream_is_read_as_far_as_the_limit(tiny_model):
    taken = []

    def rows():
        for number in range(10**9):
            taken.append(number)
            yield {"text": f"The city of {number}"}

    assert len(ps.run(SCOPE, model=tiny_model(), data=rows(), limit=2).rows) == 2
    assert taken == [0, 1]


def test_a_missing_value_of_a_frame_is_refused(tiny_model):
    frame = pd.DataFrame({"text": ["The Eiffel", None], "n": [None, None]})
    with pytest.raises(DataError, match="row 2: the column 'text' is missing"):
        ps.run(SCOPE, model=tiny_model(), data=frame)
    assert len(ps.run(SCOPE, model=tiny_model(), data=frame.dropna(subset=["text"])).rows) == 1


@pytest.mark.parametrize("kind", ["affine", "tuned_lens"])
def test_a_fit_takes_a_frame(tiny_model, kind):
    texts = [f"The Eiffel Tower is in the city of {letter}" for letter in "abcdefghij"]
    frame = pd.DataFrame({"text": texts, "when": pd.NaT})
    options = {"pairs": "1:2"} if kind == "affine" else {"layers": [1], "training": Training(steps=1)}
    fitted = ps.fit(kind, model=tiny_model(), data=frame, column="text", **options)
    assert json.dumps(fitted.about.dump(), default=str)


FORMS = (
    'Give rows ([{"entity": "Paris"}]), a pandas DataFrame, a datasets.Dataset, or where they are: {"file": '
    '"rows.jsonl"}.'
)
BAD = {
    "texts": (
        ["Paris"],
        f"data, row 1: 'Paris' is not a row; a row is a mapping of columns to values. {FORMS}",
    ),
    "a number": (5, f"data is 5, which is not a list of rows. {FORMS}"),
    "bytes": (b"Paris", f"data is b'Paris', which is not a list of rows. {FORMS}"),
    "a file": (
        "rows.jsonl",
        "data is 'rows.jsonl', and a text does not say what it is. Give {'file': 'rows.jsonl'}.",
    ),
    "a builtin name": (
        "contexts",
        "data is 'contexts', and a text does not say what it is. Give {'builtin': 'contexts'}.",
    ),
    "columns": (
        {"text": ["a", "b"]},
        (
            "data is a mapping with the keys 'text', which are not those of a recipe's data. Give columns "
            "as pandas.DataFrame(data), a single row as [data], and a split of a dataset as data['train']. "
            f"{FORMS}"
        ),
    ),
    "a dataset with splits": (
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
        (
            "data is a mapping with the keys 'train', which are not those of a recipe's data. Give columns "
            "as pandas.DataFrame(data), a single row as [data], and a split of a dataset as data['train']. "
            f"{FORMS}"
        ),
    ),
    "a column": (
        pd.Series(["Paris"]),
        f"data, row 1: 'Paris' is not a row; a row is a mapping of columns to values. {FORMS}",
    ),
    "an array": (
        np.zeros((1, 2)),
        f"data, row 1: array([0., 0.]) is not a row; a row is a mapping of columns to values. {FORMS}",
    ),
    "columns without names": (
        pd.DataFrame([["Paris"]]),
        (
            "data, row 1: the column 0 has a name that is not a text. Name the columns in words, so that "
            "{column} placeholders can name them."
        ),
    ),
    "a column twice": (
        pd.DataFrame([["a", "b"]], columns=["text", "text"]),
        "data has two columns 'text'. Give every column its own name.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_data_says_what_to_give(tiny_model, name):
    data, message = BAD[name]
    with pytest.raises(DataError) as caught:
        ps.run(SCOPE, model=tiny_model(), data=data)
    assert str(caught.value) == message


def test_a_wrong_key_beside_a_right_one_is_named():
    with pytest.raises(SpecError, match=r"splits: is not a field here\. Did you mean 'split'"):
        as_data({"hub": "org/name", "splits": "test"})


@pytest.mark.parametrize(
    ("scope", "kind"), [({"source": {}}, "dict"), (5, "int"), (None, "NoneType"), ([SCOPE], "list")]
)
def test_what_cannot_be_run(scope, kind):
    with pytest.raises(InputError) as caught:
        ps.run(scope)
    assert str(caught.value) == (
        f"a {kind} cannot be run. Give a Patchscope, a Recipe, or the name or file of a recipe; a mapping "
        "becomes a recipe by ps.Recipe(**mapping)."
    )
