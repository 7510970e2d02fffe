"""Fits of models for which the proof withholds something: the same numbers in other passes, or refused."""

from __future__ import annotations

from dataclasses import replace

import faults
import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn.errors import ModelError
from patchscope_nn.fitting.closed.states import Pairing
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.models import Verdict, Withheld

TEXTS = [
    {"text": "".join(tiny.PIECES[(7 * i + j * (i % 5 + 1)) % 13] for j in range(6 + i % 3))}
    for i in range(24)
]
FITS = {"data": TEXTS, "pairs": "1:2", "positions": 3}
TRAINS = {"layers": [1], "training": Training(steps=2, batch=4, learning_rate=0.01)}
ROWS = [{"word": row["text"], "said": " a" + " b" * (i % 3)} for i, row in enumerate(TEXTS)]
THROUGH_TEXT = {
    "source": ps.Source(prompt="{word}", layer=1),
    "target": ps.Target(prompt="The Paris -> x", position="x", layer=1),
    "text": "{said}",
    "training": TRAINS["training"],
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A tiny model that was proven before with a verdict of the test's."""
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path))

    def load(*withheld):
        model = ps.load(tiny.make_module("llama"), tokenizer=tiny.TOKENIZER, proof=False)
        verdict = Verdict(key="key", withheld=tuple(Withheld(name, None, 0, "why") for name in withheld))
        return replace(model, info=replace(model.info, verdict=verdict))

    return load


@pytest.fixture
def passes(monkeypatch):
    """The lengths of the texts of each pass in which states are read."""
    true, lengths = Pairing._read, []

    def read(pairing, rows, layers):
        lengths.append([len(row.source) for row in rows])
        return true(pairing, rows, layers)

    monkeypatch.setattr(Pairing, "_read", read)
    return lengths


def test_a_fit_is_right_where_padding_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path))

    def weight(**options):
        model = ps.load(tiny.make_module("gpt2"), tokenizer=tiny.TOKENIZER, **options)
        return ps.fit("affine", model=model, **FITS).parts((1, 2))["weight"]

    one = weight()
    faults.FAULTS["positions"].plant(monkeypatch)
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path / "other"))
    same, other = weight(), weight(proof=False)
    torch.testing.assert_close(one, same, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(one, other, atol=1e-2)


def test_texts_share_a_pass_as_far_as_the_proof_allows(load, passes):
    for withheld, allowed in (
        ((), lambda lengths: True),
        (("mixed_lengths",), lambda lengths: len(set(lengths)) == 1),
        (("source_sharing",), lambda lengths: len(lengths) == 1),
    ):
        passes.clear()
        ps.fit("affine", model=load(*withheld), **FITS)
        assert all(allowed(lengths) for lengths in passes)
        assert sum(map(len, passes)) >= len(TEXTS)
        assert any(len(set(lengths)) > 1 for lengths in passes) == (not withheld)
        assert any(len(lengths) > 1 for lengths in passes) == (withheld != ("source_sharing",))


@pytest.mark.parametrize(
    ("withheld", "message"),
    [
        ("mixed_lengths", "wrong where one pass reads texts of different lengths, as its proof found"),
        ("source_sharing", "wrong where one pass reads several texts, as its proof found"),
    ],
)
def test_a_kind_that_is_trained_on_such_passes_is_refused(withheld, message, load):
    with pytest.raises(ModelError, match=message) as caught:
        ps.fit("trained_scale", model=load(withheld), data=ROWS, **THROUGH_TEXT)
    assert "fit a mapping in closed form" in str(caught.value).lower()
    assert ps.fit("trained_scale", model=load(), data=ROWS, **THROUGH_TEXT)


@pytest.mark.parametrize("withheld", ["mixed_lengths", "source_sharing"])
def test_a_lens_is_trained_on_states_that_are_read_in_passes_that_are_right(withheld, load):
    models = (load(), load(withheld))
    first, second = (ps.fit("tuned_lens", model=model, data=TEXTS, **TRAINS) for model in models)
    (pair,) = first.pairs
    for name, value in first.parts(pair).items():
        torch.testing.assert_close(value, second.parts(pair)[name], atol=1e-5, rtol=1e-4)


def test_texts_of_one_length_are_trained_on_where_padding_is_wrong(load):
    rows = [row | {"said": " a"} for row in ROWS]
    models = (load(), load("mixed_lengths"))
    first, second = (ps.fit("trained_scale", model=model, data=rows, **THROUGH_TEXT) for model in models)
    (pair,) = first.pairs
    for name, value in first.parts(pair).items():
        torch.testing.assert_close(value, second.parts(pair)[name], atol=1e-5, rtol=1e-4)
