"""Layer selectors: what they name, and what they say when they name nothing."""

from __future__ import annotations

import pytest

from patchscope_nn.errors import LayerError
from patchscope_nn.layers import EMBED, parse_layers, resolve_layers


def resolve(value, *, n_layers=6):
    return resolve_layers(parse_layers(value), n_layers=n_layers, field="source.layer")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, (0,)),
        (5, (5,)),
        (-1, (5,)),
        (-6, (0,)),
        ("all", (0, 1, 2, 3, 4, 5)),
        ("embed", (EMBED,)),
        ("1:4", (1, 2, 3)),
        (":2", (0, 1)),
        ("4:", (4, 5)),
        ("-2:", (4, 5)),
        ("0:6:2", (0, 2, 4)),
        ("::3", (0, 3)),
        ("0:100", (0, 1, 2, 3, 4, 5)),
        (range(1, 6, 2), (1, 3, 5)),
        ([3, 0, -3], (3, 0)),
        (["embed", "all"], (EMBED, 0, 1, 2, 3, 4, 5)),
        (["4:", 1, "all"], (4, 5, 1, 0, 2, 3)),
    ],
)
def test_selectors_name_blocks(value, expected):
    assert resolve(value) == expected


def test_a_target_may_say_same():
    assert parse_layers("same", same=True) == "same"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            6,
            "source.layer=6 is outside this model, whose 6 blocks are 0..5 (or -6..-1 from the end). "
            "Use 'embed' for the input of block 0.",
        ),
        (
            [0, -7],
            "source.layer=-7 is outside this model, whose 6 blocks are 0..5 (or -6..-1 from the end). "
            "Use 'embed' for the input of block 0.",
        ),
        (
            "6:9",
            "source.layer='6:9' holds no layer of this model, whose blocks are 0..5. "
            "A range leaves its stop out, as in Python: '0:10' is layers 0 to 9.",
        ),
        (
            "3:3",
            "source.layer='3:3' holds no layer of this model, whose blocks are 0..5. "
            "A range leaves its stop out, as in Python: '0:10' is layers 0 to 9.",
        ),
    ],
)
def test_layers_the_model_lacks(value, message):
    with pytest.raises(LayerError) as raised:
        resolve(value)
    assert str(raised.value) == message


ALLOWED = "give an int (negative counts from the end), a list, 'start:stop[:step]', 'all' or 'embed'"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("last", f"'last' is no layer; {ALLOWED}"),
        ("same", f"'same' is no layer; {ALLOWED}"),
        ("1-3", f"'1-3' is no layer; {ALLOWED}"),
        ("1:4:-1", f"'1:4:-1' is no layer; {ALLOWED}"),
        (1.0, f"1.0 is no layer; {ALLOWED}"),
        (True, f"True is no layer; {ALLOWED}"),
        (None, f"None is no layer; {ALLOWED}"),
        ([], f"is an empty list; {ALLOWED}"),
        ([0, "same"], f"'same' is no layer; {ALLOWED}"),
    ],
)
def test_what_is_no_selector(value, message):
    with pytest.raises(ValueError, match=r"give an int") as raised:
        parse_layers(value)
    assert str(raised.value) == message


def test_a_step_of_zero_is_no_selector():
    with pytest.raises(ValueError, match="is no layer"):
        parse_layers("0:4:0")


def test_a_target_is_told_of_same():
    with pytest.raises(ValueError, match=r"'last' is no layer; .* or 'same'$"):
        parse_layers("last", same=True)
