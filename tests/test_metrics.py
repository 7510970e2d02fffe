"""Metrics, each against another computation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from patchscope_nn.metrics import METRICS, MetricUse, check_metrics, compute_metrics, parse_metric, rouge_l_f1
from patchscope_nn.spec import Choices, Generate, NextToken

SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
WORDS = st.lists(
    st.sampled_from(["a", "British", "royal", "family,", "the", "it's", "1984", "é"]), max_size=12
)


@given(WORDS.map(" ".join), WORDS.map(" ".join))
def test_rouge_l_is_that_of_rouge_score(text, reference):
    expected = SCORER.score(reference, text)["rougeL"].fmeasure
    assert rouge_l_f1(text, reference) == pytest.approx(expected, abs=1e-12)


NEXT = {"top_ids": [5, 7], "reference_ids": [7], "surprisal_nats": 1.5, "nll_nats": 2.5}


@pytest.mark.parametrize(
    ("use", "columns", "row", "expected"),
    [
        ("precision_at_1", NEXT, {}, 0.0),
        ("precision_at_1", NEXT | {"reference_ids": [5]}, {}, 1.0),
        ("precision_at_1", {"top_ids": [5]}, {}, None),
        ("surprisal_nats", NEXT, {}, 1.5),
        ("nll_nats", NEXT, {}, 2.5),
        ("contains", {"text": ": New  York-City."}, {"answer": "new york city"}, 1.0),
        ("contains", {"text": ": York"}, {"answer": "New York"}, 0.0),
        ("choice_accuracy", {"choice": " Paris"}, {"answer": "Paris"}, 1.0),
        ("choice_accuracy", {"choice": " Rome"}, {"answer": "Paris"}, 0.0),
        ("rouge_l", {"text": ": American actor"}, {"answer": "American actor"}, 1.0),
    ],
)
def test_values(use, columns, row, expected):
    parameters = dict.fromkeys(METRICS[use].parameters, "answer")
    metric = parse_metric({use: parameters} if parameters else use)
    assert compute_metrics([metric], columns, row) == {use: expected}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("precision_at_2", "'precision_at_2' is no metric. Did you mean 'precision_at_1'?"),
        ("rouge_l", "rouge_l is written {rouge_l: {reference: COLUMN}}; given {}"),
        ({"rouge_l": {"ref": "x"}}, "rouge_l is written {rouge_l: {reference: COLUMN}}; given {'ref': 'x'}"),
        ({"nll_nats": {"x": "y"}}, "nll_nats is written nll_nats; given {'x': 'y'}"),
        (3, "3 is no metric; give a name, or {name: {parameter: column}}"),
    ],
)
def test_messages(value, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is what is tested)
        parse_metric(value)
    assert str(caught.value).startswith(message)


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
        ("nll_nats", Generate(), ["nll_nats reads next_token, and the readout is generate"]),
        ("rouge_l", Choices(["a", "b"]), ["rouge_l reads generate, and the readout is choices"]),
    ],
)
def test_a_metric_fits_its_readout(use, readout, problems):
    assert check_metrics([MetricUse(use)], readout) == problems
