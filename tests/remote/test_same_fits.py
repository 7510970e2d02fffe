"""A mapping that is fitted to states of a real server is the one that is fitted here."""

from __future__ import annotations

import random

import launch
import pytest
import torch

import patchscope_nn as ps

TINY = launch.TINY
WORDS = [
    "The",
    "Eiffel",
    "Tower",
    "Diana",
    "Paris",
    "is",
    "in",
    "the",
    "city",
    "of",
    "Wales",
    "Queen",
    "x",
    "y",
    "1135",
]
RANDOM = random.Random(0)  # noqa: S311 (a seeded choice, no secret)
TEXTS = [{"text": " ".join(RANDOM.choices(WORDS, k=10))} for _ in range(60)]


@pytest.mark.parametrize("kind", ["affine", "orthogonal"])
def test_a_closed_form(kind, ndif, folders):
    asked = {"pairs": "1:2,0:3", "data": {"rows": TEXTS}, "positions": 4}
    here = ps.fit(kind, model=folders[TINY], **asked)
    there = ps.fit(kind, model=TINY, remote=ndif, **asked)
    assert set(there.pairs) == {(1, 2), (0, 3)}
    for pair in here.pairs:
        for name, tensor in here.parts(pair).items():
            torch.testing.assert_close(there.parts(pair)[name], tensor, atol=1e-4, rtol=1e-3)
    for one, other in zip(here.about.held_out.values(), there.about.held_out.values(), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-3)


def test_a_run_that_fits_its_mapping_first(ndif, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path))
    scope = ps.Patchscope(
        source=ps.Source(prompt="Diana is in Paris", layer=[1, 3]),
        target=ps.Target(prompt="The Tower x", layer=2),
        mapping={"fit": {"kind": "affine", "data": {"rows": TEXTS}, "positions": 4}},
        readout=ps.NextToken(),
    )
    here = ps.run(scope, model=folders[TINY], controls=["random"]).table()
    there = ps.run(scope, model=TINY, remote=ndif, controls=["random"]).table()
    assert list(there["top_tokens"]) == list(here["top_tokens"])
    assert torch.allclose(*(torch.tensor(list(one["top_probs"])) for one in (here, there)), atol=1e-3)
