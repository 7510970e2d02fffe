"""Every source, write and target prompt gives on a real server what it gives here."""

from __future__ import annotations

import launch
import pytest
import torch
from fits import random_fit, space
from safetensors.torch import save_file
from test_same_table import ROWS, assert_same

import patchscope_nn as ps

TINY, WIDTH = launch.TINY, 48
SOURCES = {
    "before": {"site": "before"},
    "the mean of positions": {"position": {"start": 0}, "mean": "positions"},
    "the mean of rows": {"mean": "rows"},
    "a difference": {"minus": "The"},
}
TARGETS = {
    "add": {"write": "add"},
    "add_matched": {"write": "add_matched"},
    "blend": {"write": {"blend": 0.3}},
    "zero": {"write": "zero"},
    "noise": {"write": {"noise": 2.0}},
    "cut": {"write": {"cut": {"position": 0}}, "window": 2},
    "scale": {"scale": [0.5, 2.0]},
    "window": {"window": 2},
    "every step": {"write": "add", "every_step": True},
    "corrupt": {"corrupt": {"position": 1, "samples": 2}},
    "several tokens": {"position": {"every": " in"}},
    "several prompts": {"prompt": None, "prompts": ["Diana is in x", "The x"]},
    "l in the prompt": {"prompt": "Diana {source_layer} x"},
}


def scope_of(*, source=None, target=None, readout=None, mapping="identity"):
    where = {"prompt": "Diana is in Paris in x", "position": -1, "layer": [1, 2]} | (target or {})
    return ps.Patchscope(
        source=ps.Source(**({"prompt": "{s}", "layer": [1, 3]} | (source or {}))),
        target=ps.Target(**where),
        readout=readout or ps.NextToken(),
        mapping=mapping,
    )


def both(scope, ndif, folders, *, data=ROWS, controls=("unpatched",)):
    """The table of a run here and of one there."""
    asked = {"data": data, "controls": list(controls)}
    here = ps.run(scope, model=ps.load(folders[TINY]), **asked).table()
    there = ps.run(scope, model=ps.load(TINY, weights=False), remote=ndif, **asked).table()
    return here, there


@pytest.mark.parametrize("name", SOURCES)
def test_every_source(name, ndif, folders):
    assert_same(*both(scope_of(source=SOURCES[name]), ndif, folders))


@pytest.mark.parametrize("name", TARGETS)
def test_every_write_and_prompt(name, ndif, folders):
    decodes = name == "every step"
    readout = ps.Generate(max_new_tokens=4) if decodes else ps.NextToken()
    assert_same(*both(scope_of(target=TARGETS[name], readout=readout), ndif, folders))


@pytest.mark.parametrize(
    "readout",
    [ps.Generate(max_new_tokens=4, relevancy=True), ps.Hidden(clean=True)],
    ids=["relevancy", "clean"],
)
def test_what_readouts_give_when_asked(readout, ndif, folders):
    assert_same(*both(scope_of(readout=readout), ndif, folders))


def test_vectors_soft_prompts_and_maps_by_layer_travel(ndif, folders, tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_file({"v": torch.randn(2, WIDTH, generator=generator)}, tmp_path / "v.safetensors")
    save_file({"soft_prompt": torch.randn(3, WIDTH, generator=generator)}, tmp_path / "s.safetensors")
    vector = {"prompt": None, "vector": {"file": str(tmp_path / "v.safetensors"), "index": "{n}"}}
    assert_same(*both(scope_of(source=vector), ndif, folders, data=[{"n": 0}, {"n": 1}]))
    soft = {"soft_prompt": str(tmp_path / "s.safetensors")}
    assert_same(*both(scope_of(target=soft), ndif, folders))
    fitted = random_fit(
        [(1, 1), (1, 2), (3, 1), (3, 2)], source=space(WIDTH, TINY), target=space(WIDTH, TINY)
    )
    assert_same(*both(scope_of(mapping=fitted), ndif, folders))


def test_text_only_is_one_more_prompt(ndif, folders):
    assert_same(*both(scope_of(), ndif, folders, controls=("text-only", "random", "shuffled")))
