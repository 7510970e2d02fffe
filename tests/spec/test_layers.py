"""Layer selectors: what they name, and what they say when they name nothing."""

from __future__ import annotations

import re

import pytest

from patchscope_nn.errors import LayerError
from patchscope_nn.spec.layers import EMBED, parse_layers, resolve_layers

ALLOWED = "give an int (negative counts from the end), a list, 'start:stop[:step]', 'all' or 'embed'"


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


@pytest.mark.parametrize(("value", "named"), [(6, 6), (-7, -7), ([0, -7], -7), (["all", 9], 9)])
def test_layers_the_model_lacks(value, named):
    with pytest.raises(LayerError) as raised:
        resolve(value)
    assert str(raised.value) == (
        f"source.layer={named} is outside this model, whose 6 blocks are 0..5 (or -6..-1 from the end). "
        "Use 'embed' for the input of block 0."
    )


@pytest.mark.parametrize("value", ["6:9", "3:3", "4:2"])
def test_ranges_that_hold_no_layer(value):
    with pytest.raises(LayerError) as raised:
        resolve(value)
    assert str(raised.value) == (
        f"source.layer={value!r} holds no layer of this model, whose blocks are 0..5. "
        "A range excludes its stop, as in Python: '0:10' is layers 0 to 9."
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("last", "'last' is not a valid layer; "),
        ("same", "'same' is not a valid layer; "),
        ("1-3", "'1-3' is not a valid layer; "),
        ("1:4:-1", "'1:4:-1' is not a valid layer; "),
        ("1:4:0", "'1:4:0' is not a valid layer; "),
        (1.0, "1.0 is not a valid layer; "),
        (True, "True is not a valid layer; "),
        (None, "None is not a valid layer; "),
        ([], "is an empty list; "),
        ([0, "same"], "'same' is not a valid layer; "),
    ],
)
def test_what_is_no_selector(value, problem):
    with pytest.raises(ValueError, match=f"^{re.escape(problem + ALLOWED)}$"):
        parse_layers(value)


def test_a_target_is_told_of_same():
    with pytest.raises(ValueError, match=r"^'last' is not a valid layer; .* or 'same'$"):
        parse_layers("last", same=True)
