"""Metrics, each against another computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_cell import compute_metrics
from rouge_score import rouge_scorer
from scipy.special import logsumexp

from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.metrics import (
    METRICS,
    MetricUse,
    check_columns,
    check_metrics,
    parse_metric,
    rouge_1_f1,
    rouge_l_f1,
)
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken

SCORER = rouge_scorer.RougeScorer(["rougeL", "rouge1"], use_stemmer=False)
WORDS = st.lists(
    st.sampled_from(["a", "British", "royal", "family,", "the", "it's", "1984", "é"]), max_size=12
)


@pytest.mark.quick
@given(WORDS.map(" ".join), WORDS.map(" ".join))
def test_rouge_is_that_of_rouge_score(text, reference):
    expected = SCORER.score(reference, text)
    assert rouge_l_f1(text, reference) == pytest.approx(expected["rougeL"].fmeasure, abs=1e-12)
    assert rouge_1_f1(text, reference) == pytest.approx(expected["rouge1"].fmeasure, abs=1e-12)


STATES = st.integers(1, 3).flatmap(
    lambda count: st.lists(
        st.lists(st.floats(-5, 5).map(lambda value: round(value, 2)), min_size=4, max_size=4),
        min_size=2 * count,
        max_size=2 * count,
    )
)


BOTH = [parse_metric("cosine"), parse_metric("fraction_of_variance")]


@given(STATES)
def test_cosine_and_fraction_of_variance_are_those_of_numpy(states):
    written, clean = states[::2], states[1::2]
    one, other = np.array(written), np.array(clean)
    found = compute_metrics(BOTH, {"hidden": written, "clean": clean}, {}).values
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    if (norms == 0).any():
        assert found["cosine"] is None
    else:
        assert found["cosine"] == pytest.approx(((one * other).sum(axis=1) / norms).mean())
    if (np.ptp(other, axis=1) > 0).all():
        expected = (1 - ((one - other) ** 2).mean(axis=1) / other.var(axis=1)).mean()
        assert found["fraction_of_variance"] == pytest.approx(expected)


def test_a_state_replaced_by_itself_is_all_of_itself():
    columns = {"hidden": [[1.0, 2.0, 4.0]], "clean": [[1.0, 2.0, 4.0]]}
    found = compute_metrics(BOTH, columns, {}).values
    assert found == {"cosine": pytest.approx(1.0), "fraction_of_variance": 1.0}


@given(st.lists(st.floats(-40, 0), min_size=2, max_size=6), st.integers(0, 5))
def test_log_odds_are_those_of_the_probabilities(logprobs, place):
    place %= len(logprobs)
    columns = {"choices": [f" {number}" for number in range(len(logprobs))], "choice_logprobs": logprobs}
    use = parse_metric({"choice_log_odds": {"answer": "answer"}})
    others = [one for number, one in enumerate(logprobs) if number != place]
    found = compute_metrics([use], columns, {"answer": place}).values["choice_log_odds"]
    assert found == pytest.approx(logprobs[place] - logsumexp(others), abs=1e-9)
    found = compute_metrics([use], columns, {"answer": "none of them"})
    assert found == ({"choice_log_odds": None}, [])


NEXT = {
    "top_ids": [5, 7],
    "reference_ids": [7],
    "reference_ranks": [4],
    "source_top_ids": [7, 8],
    "surprisal_nats": 1.5,
    "nll_nats": 2.5,
    "kl_nats": 0.5,
}
PROBS = {"token_probs": [0.5, 0.75], "unpatched_token_probs": [0.25, 1.0]}


@pytest.mark.parametrize(
    ("use", "columns", "row", "expected"),
    [
        ("precision_at_1", NEXT, {}, 0.0),
        ("precision_at_1", NEXT | {"reference_ids": [5]}, {}, 1.0),
        ("precision_at_1", {"top_ids": [5]}, {}, None),
        ("surprisal_nats", NEXT, {}, 1.5),
        ("nll_nats", NEXT, {}, 2.5),
        ("kl_nats", NEXT, {}, 0.5),
        ("kl_nats", {"top_ids": [5]}, {}, None),
        ("rank", NEXT, {}, 4.0),
        ("rank", {"top_ids": [5]}, {}, None),
        ("reciprocal_rank", NEXT, {}, 0.25),
        ("reciprocal_rank", {"top_ids": [5]}, {}, None),
        ("top_k_overlap", NEXT, {}, 0.5),
        ("top_k_overlap", NEXT | {"source_top_ids": [7, 5]}, {}, 1.0),
        ("top_k_overlap", {"top_ids": [5]}, {}, None),
        ("relevancy", PROBS, {}, 0.25),
        ("relevancy", {"token_probs": [], "unpatched_token_probs": []}, {}, None),
        ("cosine", {"hidden": [[1.0, 0.0], [0.0, 2.0]], "clean": [[3.0, 0.0], [1.0, 0.0]]}, {}, 0.5),
        ("cosine", {"hidden": [[1.0, 0.0]], "clean": [[0.0, 0.0]]}, {}, None),
        ("fraction_of_variance", {"hidden": [[0.0, 0.0]], "clean": [[1.0, -1.0]]}, {}, 0.0),
        ("fraction_of_variance", {"hidden": [[1.0, 0.0]]}, {}, None),
        ("rouge_1", {"text": "actor American"}, {"answer": "American actor"}, 1.0),
        (
            "choice_log_odds",
            {"choices": [" a", " b"], "choice_logprobs": [math.log(0.5), math.log(0.25)]},
            {"answer": "a"},
            pytest.approx(math.log(2)),
        ),
        ("contains", {"text": "naïve_Zoë's"}, {"answer": "Zoë"}, 1.0),
        ("contains", {"text": ": New  York-City."}, {"answer": "new york city"}, 1.0),
        ("contains", {"text": ": York"}, {"answer": "New York"}, 0.0),
        ("choice_accuracy", {"choice": " Paris"}, {"answer": "Paris"}, 1.0),
        ("choice_accuracy", {"choice": " Rome"}, {"answer": "Paris"}, 0.0),
        ("rouge_l", {"text": ": American actor"}, {"answer": "American actor"}, 1.0),
    ],
)
def test_values(use, columns, row, expected):
    parameters = dict.fromkeys(METRICS.find(use).parameters, "answer")
    metric = parse_metric({use: parameters} if parameters else use)
    assert compute_metrics([metric], columns, row) == ({use: expected}, [])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("precision_at_2", "'precision_at_2' is not a known metric. Did you mean 'precision_at_1'?"),
        ("rouge_l", "rouge_l is written {rouge_l: {reference: COLUMN}}; given {}"),
        ({"rouge_l": {"ref": "x"}}, "rouge_l is written {rouge_l: {reference: COLUMN}}; given {'ref': 'x'}"),
        ({"nll_nats": {"x": "y"}}, "nll_nats is written nll_nats; given {'x': 'y'}"),
        (
            {"rouge_l": {"reference": ["a"]}},
            "rouge_l is written {rouge_l: {reference: COLUMN}}; given {'reference': ['a']}",
        ),
        (3, "3 is not a metric; give a name, {name: {parameter: column}}, or {function: module:name}"),
    ],
)
def test_messages(value, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is what is tested)
        parse_metric(value)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("row", "near"),
    [({}, "There are none."), ({"royals": "x"}, "Did you mean 'royals'? Allowed: royals.")],
)
def test_a_text_in_the_place_of_a_column_is_told_how_to_be_one(row, near):
    with pytest.raises(DataError) as caught:
        check_columns([parse_metric({"contains": {"reference": "royal"}})], [row])
    assert str(caught.value) == (
        "metrics.contains.reference='royal' is not a column of data row 0. A metric's parameter names a "
        f"column of the data. {near} A text that is the same for every row must be a column, too: "
        "data: {rows: [{reference: royal}]}, and contains: {reference: reference}."
    )


def test_no_name_is_allowed():
    assert did_you_mean("royal", []) == "There are none."
    assert did_you_mean("royal", ["loyal"]) == "Did you mean 'loyal'? Allowed: loyal."


def test_a_metric_dumps_as_it_is_written():
    for written in ("nll_nats", {"rouge_l": {"reference": "description"}}):
        assert parse_metric(written).dump() == written
        assert parse_metric(parse_metric(written)) == parse_metric(written)


@pytest.mark.parametrize(
    ("use", "readout", "problems"),
    [
        ("nll_nats", NextToken(reference="source"), []),
        (
            "nll_nats",
            NextToken(),
            ["nll_nats needs readout.next_token.reference, for example reference: source"],
        ),
        ("kl_nats", NextToken(reference=" a"), []),
        ("kl_nats", NextToken(reference="source"), []),
        ("cosine", Hidden(), ["cosine needs readout.hidden.clean: true"]),
        ("cosine", Hidden(clean=True), []),
        ("relevancy", Generate(), ["relevancy needs readout.generate.relevancy: true"]),
        ("relevancy", Generate(relevancy=True), []),
        ("nll_nats", Generate(), ["nll_nats reads next_token, and the readout is generate"]),
        ("rouge_l", Choices(["a", "b"]), ["rouge_l reads generate, and the readout is choices"]),
    ],
)
def test_a_metric_fits_its_readout(use, readout, problems):
    assert check_metrics([MetricUse(use, metric=METRICS.find(use))], readout) == problems
