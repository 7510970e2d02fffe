"""Which drafts become builtin texts, and where they are cut; the model that writes them is not run."""

import itertools

import pytest

from benchmarks import make_texts
from benchmarks.make_texts import cut, keep, requests

PROSE = (
    "The harbour lay in the fog as the last of the boats came in with a load of herring that was "
    "to be sold on the market by noon, and nobody spoke of the storm."
)


def test_a_text_is_kept_once():
    other = PROSE.replace("harbour", "village").replace("boats", "carts").replace("herring", "apples")
    other = other.replace("fog", "valley").replace("storm", "war").replace("noon", "night")
    assert keep([PROSE, "", other, PROSE]) == [PROSE, other]


@pytest.mark.parametrize(
    "draft",
    [
        "As an AI, I have no harbour. " + PROSE,
        PROSE + " Yours, [Your Name]",
        PROSE + " Yours, [Colleague_Name]",
        PROSE + " There was a murderer on board.",
        "La lune est une belle chose pour les hommes qui aiment la nuit et les étoiles du ciel.",
        "boats boats sail sail wind wind herring herring market market noon noon storm storm",
        "a load of herring was here, " * 4,
    ],
    ids=["refusal", "blank", "blank_", "violence", "French", "no prose", "repeats"],
)
def test_a_bad_draft_is_left_out(draft):
    assert keep([draft]) == []


def test_code_needs_no_common_words():
    code = "```python\ndef longest(words):\n    return max(words, key=len)\n```"
    assert keep([code]) == [code]


def test_one_opening_comes_six_times_at_most():
    drafts = [f"Once upon a time {chr(97 + n)}{n} was the {n} of {n * 7}, and in {n * 3}" for n in range(9)]
    assert keep(drafts) == drafts[:6]


def test_a_draft_is_cut_at_a_sentence_and_loses_its_preface(tiny_model, monkeypatch):
    monkeypatch.setattr(make_texts, "LEAST", 5)
    monkeypatch.setattr(make_texts, "MOST", 12)
    tokenizer = tiny_model("llama").tokenizer
    text = "Here is a story:\n\nThe city is in the city. The city of Paris, and so on and on"
    assert cut(tokenizer, text) == "The city is in the city."
    assert cut(tokenizer, "Hm") == ""


def test_requests_differ_and_some_are_for_code():
    asked = list(itertools.islice(requests(), 900))
    prose = [one for one in asked if "SQL" not in one and "function" not in one]
    assert len(set(asked)) > 850
    assert 600 < len(prose) < 850
