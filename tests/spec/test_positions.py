"""Position selectors: what they name, and what they say when they name nothing."""

from __future__ import annotations

import re

import pytest
import tiny

from patchscope_nn.errors import DataError, InputError, PositionError
from patchscope_nn.spec.encoding import encode
from patchscope_nn.spec.positions import (
    Each,
    Every,
    Span,
    Tokens,
    fill,
    parse_positions,
    resolve_positions,
    texts_of,
)

TEXT = "The Eiffel Tower is in the Eiffel city"
TOKENS = ("The", " E", "iff", "el", " Tower", " is", " in", " the", " E", "iff", "el", " city")
NUMBERED = ", ".join(f"{number} {token!r}" for number, token in enumerate(TOKENS))
COUNT = 12
HINT = "Use an index (-1 is the last token), or a text that ends where a token ends."


def resolve(value, prompt=TEXT, *, tokenizer=tiny.TOKENIZER):
    encoded = encode(prompt, tokenizer, field="source.prompt")
    return resolve_positions(parse_positions(value), encoded, field="source.position")


def test_the_prompt_has_the_tokens_these_tests_count_on():
    encoded = encode(TEXT, tiny.TOKENIZER, field="source.prompt")
    assert encoded.numbered() == NUMBERED
    assert encoded.numbered(most=2) == "0 'The', 1 ' E', ..."
    assert list(encoded.ids) == tiny.TOKENIZER(TEXT)["input_ids"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(0, [(0,)], id="first"),
        pytest.param(-1, [(11,)], id="last"),
        pytest.param(-12, [(0,)], id="first from the end"),
        pytest.param("Tower", [(4,)], id="word, without its space"),
        pytest.param(" Tower", [(4,)], id="word, with its space"),
        pytest.param("Eiffel", [(10,)], id="last occurrence, last token"),
        pytest.param("first:Eiffel", [(3,)], id="first occurrence"),
        pytest.param("first: Eiffel", [(3,)], id="first occurrence, with its space"),
        pytest.param("The Eiffel", [(3,)], id="several words"),
        pytest.param("E", [(8,)], id="part of a word that is a token"),
        pytest.param("iff", [(9,)], id="token inside a word"),
        pytest.param(TEXT, [(11,)], id="whole prompt"),
        pytest.param({"start": 1, "end": 4}, [(1, 2, 3)], id="span"),
        pytest.param({"start": -2}, [(10, 11)], id="span to the end"),
        pytest.param({"start": -4, "end": -2}, [(8, 9)], id="span from the end"),
        pytest.param({"start": 0, "end": 12}, [tuple(range(12))], id="span of everything"),
        pytest.param(Span(start=2, end=3), [(2,)], id="span object"),
        pytest.param([4, "city"], [(4, 11)], id="list"),
        pytest.param([-1, 0], [(11, 0)], id="list in its own order"),
        pytest.param(range(2), [(0, 1)], id="range"),
        pytest.param({"each": [0, "Tower", -1]}, [(0,), (4,), (11,)], id="each of a list"),
        pytest.param({"each": [{"start": 0, "end": 2}, 5]}, [(0, 1), (5,)], id="each, spans among them"),
        pytest.param({"each": "all"}, [(place,) for place in range(12)], id="each token"),
        pytest.param(Each(range(2)), [(0,), (1,)], id="each of a range"),
        pytest.param({"each": [-1, 11, "city"]}, [(11,)], id="each names a token once"),
        pytest.param({"tokens": "Eiffel"}, [(8, 9, 10)], id="all tokens of the last occurrence"),
        pytest.param({"tokens": " Eiffel city"}, [(8, 9, 10, 11)], id="all tokens of two words"),
        pytest.param({"tokens": "fel"}, [(9, 10)], id="all tokens a text has a part in"),
        pytest.param(Tokens(tokens="The"), [(0,)], id="tokens object"),
        pytest.param({"every": "Eiffel"}, [(3, 10)], id="every occurrence, last tokens"),
        pytest.param({"every": "el"}, [(3, 10)], id="every occurrence of a token"),
        pytest.param({"every": "E"}, [(1, 8)], id="every token that spells it"),
        pytest.param(Every(every="Tower"), [(4,)], id="every object"),
        pytest.param(
            {"each": [{"tokens": "Eiffel"}, {"every": "Eiffel"}]}, [(8, 9, 10), (3, 10)], id="each of them"
        ),
    ],
)
def test_selectors_name_tokens(value, expected):
    assert resolve(value) == tuple(expected)


def test_a_leading_special_token_counts():
    assert resolve(0, tokenizer=tiny.TOKENIZER_BOS) == ((0,),)
    assert resolve("first:The", tokenizer=tiny.TOKENIZER_BOS) == ((1,),)
    assert resolve(-1, tokenizer=tiny.TOKENIZER_BOS) == ((COUNT,),)
    encoded = encode(TEXT, tiny.TOKENIZER_BOS, field="source.prompt")
    assert encoded.numbered(most=2) == "0 '<bos>', 1 'The', ..."


def test_a_line_break_is_a_token_like_others():
    assert resolve("\n", "The\n Tower\n is") == ((3,),)
    assert resolve("first:\n", "The\n Tower\n is") == ((1,),)


def test_a_chat_is_addressed_as_the_template_writes_it():
    chat = [("user", "The Tower"), ("assistant", " Paris")]
    text = "<start>user\nThe Tower<end>\n<start>assistant\n Paris<end>\n<start>assistant\n"
    encoded = encode(tuple(chat), tiny.TOKENIZER, field="source.prompt")
    assert encoded.text == text
    (tower,), (end,) = resolve("Tower", tuple(chat))[0], resolve("first:<end>", tuple(chat))[0]
    assert (encoded.tokens[tower], encoded.tokens[end]) == (" Tower", "<end>")
    assert end == tower + 1
    assert list(encoded.ids) == tiny.TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_chat_gets_no_second_leading_token():
    encoded = encode((("user", "The"),), tiny.TOKENIZER_BOS, field="source.prompt")
    assert encoded.tokens[0] == "<start>"


def test_a_chat_needs_a_template():
    plain = tiny.make_tokenizer()
    plain.chat_template = None
    with pytest.raises(
        InputError, match=r"source\.prompt is a chat, .* has no chat template\. Give the prompt"
    ):
        encode((("user", "The"),), plain, field="source.prompt")


def test_token_ids_are_taken_as_they_are():
    ids = tuple(tiny.TOKENIZER(TEXT)["input_ids"])
    encoded = encode(ids, tiny.TOKENIZER_BOS, field="source.prompt")
    assert (encoded.ids, encoded.text) == (ids, TEXT)
    assert resolve("Eiffel", ids) == ((10,),)
    assert resolve(-1, ids) == ((11,),)


def test_token_ids_are_checked():
    wrong = rf"source\.prompt holds token id 104, .* ids 0\.\.{tiny.VOCAB_SIZE - 1}\. Give the prompt as text"
    with pytest.raises(InputError, match=wrong):
        encode((3, 104), tiny.TOKENIZER, field="source.prompt")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        pytest.param(12, "source.position=12 is outside", id="past the end"),
        pytest.param(-13, "source.position=-13 is outside", id="before the start"),
        pytest.param("Rome", "source.position='Rome' does not occur in", id="absent"),
        pytest.param("first:Rome", "source.position='first:Rome' does not occur in", id="absent, first"),
        pytest.param("tower", "source.position='tower' does not occur in", id="case counts"),
        pytest.param(
            "Tow", "source.position='Tow' does not end with a whole token of", id="ends inside a token"
        ),
        pytest.param(
            "ower", "source.position='ower' does not end with a whole token of", id="begins inside a token"
        ),
        pytest.param({"start": 3, "end": 3}, "source.position=[3, 3) is not a span inside", id="empty span"),
        pytest.param(
            {"start": 10, "end": 13}, "source.position=[10, 13) is not a span inside", id="span too long"
        ),
        pytest.param({"start": -13}, "source.position=[-13, None) is not a span inside", id="span too early"),
        pytest.param(
            {"start": 5, "end": 2}, "source.position=[5, 2) is not a span inside", id="span backwards"
        ),
        pytest.param([0, -12], "source.position=[0, -12] names the same token twice in", id="twice"),
        pytest.param({"each": [0, 40]}, "source.position=40 is outside", id="one of each"),
        pytest.param({"tokens": "Rome"}, "source.position: 'Rome' does not occur in", id="no tokens"),
        pytest.param(
            {"every": "ow"}, "source.position: no 'ow' ends with a whole token of", id="every, inside"
        ),
    ],
)
def test_messages_list_the_numbered_tokens(value, problem):
    with pytest.raises(PositionError) as raised:
        resolve(value)
    assert str(raised.value) == f"{problem} this 12-token prompt ({NUMBERED}). {HINT}"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (1.5, "1.5 is not a valid position; give an index"),
        (True, "True is not a valid position"),
        ("", "'' is not a valid position"),
        ("first:", "'first:' is not a valid position"),
        ([], "is an empty list"),
        ([{"start": 1}], "a list holds indices and texts, not spans"),
        ([{"every": "x"}], "a list holds indices and texts, not spans"),
        ({"every": ""}, "{'every': ''} is not a valid position"),
        ({"tokens": 3}, "{'tokens': 3} is not a valid position"),
        ({"each": [{"each": [0]}]}, "{'each': [0]} is not a valid position"),
        ({"start": 1, "stop": 2}, "is not a valid position"),
        ({"start": "The"}, "is not a valid position"),
        ({"each": []}, "is neither 'all' nor a list of positions"),
        ({"each": "some"}, "each: 'some' is neither 'all'"),
        (None, "None is not a valid position"),
    ],
)
def test_what_is_no_selector(value, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_positions(value)


@pytest.mark.parametrize(
    ("value", "filled"),
    [
        ("{a}", "Tower"),
        ("first:the {a}", "first:the Tower"),
        (["{a}", 0], ("Tower", 0)),
        ({"tokens": "{a}"}, Tokens(tokens="Tower")),
        ({"every": "{a}"}, Every(every="Tower")),
        ({"each": ["{a}", {"every": "{a}"}, 3]}, Each(["Tower", Every(every="Tower"), 3])),
        ("{{a}}", "{a}"),
        ("x", "x"),
        (-1, -1),
        ({"start": 1}, Span(start=1)),
        ({"each": "all"}, Each("all")),
    ],
)
def test_a_data_row_fills_the_texts(value, filled):
    assert fill(parse_positions(value), {"a": "Tower"}, field="source.position") == filled


def test_a_text_asks_for_a_column_the_data_lacks():
    with pytest.raises(DataError, match=r"^source\.position asks for the column 'b', .* Allowed: a\."):
        fill(parse_positions({"each": ["{b}"]}), {"a": "Tower"}, field="source.position")


def test_the_texts_of_a_selector():
    selector = parse_positions({"each": ["first:x", 3, {"every": "y"}, {"tokens": "z"}, {"start": 0}]})
    assert texts_of(selector) == ["first:x", "y", "z"]
    assert texts_of(parse_positions(["a", 1])) == ["a"]
    assert texts_of(None) == texts_of(Each("all")) == texts_of(0) == []
