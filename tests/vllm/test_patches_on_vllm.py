"""Each readout, write, source and site gives on vLLM what it gives on transformers."""

from __future__ import annotations

import pytest
import torch
from one_table import assert_one_table
from safetensors.torch import save_file

import patchscope_nn as ps
from patchscope_nn.errors import InputError

ROWS = [
    {"s": "Diana, Princess of Wales", "t": "Syria: Country in the Middle East, x"},
    {"s": "The Eiffel Tower is in the city of", "t": "Paris is the capital of x"},
]
CONTROLS = ["unpatched", "random", "shuffled", "text-only"]
READOUTS = {
    "next_token": ps.NextToken(top_k=5),
    "against the source": ps.NextToken(top_k=3, reference="source"),
    "against words": ps.NextToken(top_k=3, reference=[" France"]),
    "elsewhere": ps.NextToken(top_k=3, position=-2),
    "text": ps.Generate(max_new_tokens=6),
    "stop": ps.Generate(max_new_tokens=12, stop=","),
    "sampled": ps.Generate(max_new_tokens=6, temperature=0.9, seed=3),
    "relevancy": ps.Generate(max_new_tokens=4, relevancy=True),
    "choices": ps.Choices([" Paris", " a princess", " the capital city"]),
    "hidden": ps.Hidden(clean=True),
}
#: Fields of the target, with next-token and with text.
WRITES = {
    "add": {"write": "add"},
    "blend": {"write": {"blend": 0.3}},
    "zero": {"write": "zero"},
    "noise": {"write": {"noise": 2.0}},
    "add_matched": {"write": "add_matched"},
    "scales": {"scale": [0.5, 2]},
    "window": {"layer": "same", "window": 3},
    "own states": {"layer": "same", "window": 3, "states": "own"},
    "every step": {"layer": 20, "every_step": True},
    "every step, added": {"layer": 20, "every_step": True, "write": "add"},
    "embed": {"layer": "embed"},
    "last block": {"layer": -1},
    "span": {"position": {"start": -3}},
    "corrupt": {"position": -1, "corrupt": {"position": 0, "noise": 3, "samples": 2}},
    "attention": {"site": "attention"},
    "mlp": {"site": "mlp"},
    "before": {"site": "before"},
}
SOURCES = {
    "embed": {"layer": ["embed", 0, 29]},
    "another position": {"position": 1},
    "span": {"position": {"start": -3}},
    "mean of positions": {"mean": "positions", "position": {"start": 0}},
    "mean of rows": {"mean": "rows"},
    "minus": {"minus": "A text"},
    "attention": {"site": "attention"},
    "mlp": {"site": "mlp"},
    "before": {"site": "before", "layer": [0, 12]},
}


def scope_of(*, source=None, target=None, **rest):
    return ps.Patchscope(
        source=ps.Source(**{"prompt": "{s}", "position": -1, "layer": [3, 12]} | (source or {})),
        target=ps.Target(**{"prompt": "{t}", "position": "x", "layer": [2, 12]} | (target or {})),
        **rest,
    )


@pytest.fixture
def compare(engine, here):
    """compare(scope, ...): run on both engines, and compare the tables."""

    def run(scope, rows=ROWS, controls=("unpatched", "random"), **options):
        options |= {"data": rows, "controls": [*controls]}
        found, expected = (ps.run(scope, model=model, **options).table() for model in (engine, here))
        assert_one_table(found, expected)
        return found

    return run


@pytest.mark.parametrize("readout", READOUTS)
def test_every_readout(readout, compare):
    rows = [{**row, "t": "The x of"} for row in ROWS] if readout == "elsewhere" else ROWS
    controls = CONTROLS[:3] if readout == "elsewhere" else CONTROLS
    scope = scope_of(readout=READOUTS[readout], target={"position": 1} if readout == "elsewhere" else None)
    compare(scope, rows, controls)


@pytest.mark.parametrize("write", WRITES)
def test_every_write(write, compare):
    target = WRITES[write]
    source = {"position": {"start": -3}} if write == "span" else {}
    if write == "before":
        source = {"site": "before"}
    readouts = [ps.Generate(max_new_tokens=4)]
    readouts += [] if "every_step" in target else [ps.NextToken(top_k=5)]
    for readout in readouts:
        controls = ["unpatched"] if write in ("zero", "noise") else ["unpatched", "random"]
        compare(scope_of(source=source, target=target, readout=readout), controls=controls)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source(source, compare):
    found = SOURCES[source]
    target = {"position": {"start": -3}} if source == "span" else {}
    rows = [row | {"t": ROWS[0]["t"]} for row in ROWS] if source == "mean of rows" else ROWS
    controls = ["unpatched", "random"]
    compare(scope_of(source=found, target=target, readout=ps.NextToken(top_k=5)), rows, controls)


def test_a_vector_of_a_file(compare, tmp_path):
    file = tmp_path / "vectors.safetensors"
    save_file({"vectors": torch.randn(2, 576, generator=torch.Generator().manual_seed(0))}, file)
    source = {"prompt": None, "vector": {"file": str(file), "index": "{index}"}, "layer": 12}
    rows = [row | {"index": index} for index, row in enumerate(ROWS)]
    compare(scope_of(source=source, mapping="target_norm", readout=ps.NextToken(top_k=5)), rows)


def test_a_soft_prompt(compare, tmp_path):
    file = tmp_path / "soft.safetensors"
    save_file({"soft_prompt": torch.randn(2, 576, generator=torch.Generator().manual_seed(0)) / 10}, file)
    target = {"soft_prompt": str(file), "layer": ["embed", 5], "position": -1}
    for readout in (ps.NextToken(top_k=5), ps.Generate(max_new_tokens=4)):
        compare(scope_of(target=target, readout=readout))


def test_an_affine_mapping(compare):
    generator = torch.Generator().manual_seed(0)
    weight = torch.eye(576) + torch.randn(576, 576, generator=generator) / 100
    compare(scope_of(mapping=ps.Affine(weight, torch.ones(576) / 10), readout=ps.Generate(max_new_tokens=4)))


def test_a_failed_cell_does_not_spoil_its_neighbours(engine, here, tmp_path):
    """A vector that is not finite gives a failed cell, and only that."""
    file = tmp_path / "vectors.safetensors"
    vectors = torch.randn(3, 576, generator=torch.Generator().manual_seed(0))
    vectors[1, 7] = float("nan")
    save_file({"vectors": vectors}, file)
    source = {"prompt": None, "vector": {"file": str(file), "index": "{index}"}, "layer": 12}
    rows = [ROWS[0] | {"index": index} for index in range(3)]
    for readout in (ps.NextToken(top_k=5), ps.Generate(max_new_tokens=3), ps.Choices([" Paris", " a"])):
        scope = scope_of(source=source, readout=readout)
        found, expected = (ps.run(scope, model=model, data=rows).table() for model in (engine, here))
        failed = found["error"].notna()
        assert [*failed] == [*expected["error"].notna()]
        assert {*found["row"][failed]} == {1}
        assert_one_table(found[~failed].reset_index(drop=True), expected[~failed].reset_index(drop=True))


@pytest.mark.parametrize("text", ["", "a" * 20_000])
def test_prompts_that_do_not_fit_are_refused(text, engine):
    with pytest.raises(InputError):
        ps.run(scope_of(), model=engine, data=[{"s": text, "t": "x"}])
