"""Vectors and learned embeddings from files: what is read, what does not fit, and what tells a run apart."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import save_file

import patchscope_nn as ps
from patchscope_nn.errors import InputError, MappingError, SpecError
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep import VectorAt
from patchscope_nn.sweep.vectors import load_soft_prompt, load_vector

WIDTH = tiny.D_MODEL


@pytest.fixture
def file(tmp_path):
    """A file of vectors, matrices, and what is neither."""
    place = tmp_path / "v.safetensors"
    matrix = torch.arange(3 * WIDTH, dtype=torch.float64).view(3, WIDTH)
    tensors = {
        "one": torch.ones(WIDTH, dtype=torch.bfloat16),
        "rows": matrix,
        "number": torch.tensor(1.0),
        "cube": torch.zeros(1, 2, WIDTH),
        "wide": torch.zeros(2, WIDTH + 1),
        "soft_prompt": torch.full((2, WIDTH), 0.5),
    }
    save_file(tensors, place)
    return str(place)


def prepared(model, source, *, rows=({"n": 0},), **target):
    scope = Patchscope(
        source=Source(layer=0, **source), target=Target(**{"prompt": "x is", "position": "x"} | target)
    )
    return prepare(scope, model=model, data=list(rows)).only


def test_a_vector_is_a_row_of_numbers(file):
    one = load_vector(VectorAt(file, "one", None))
    assert (one.shape, one.dtype) == ((1, WIDTH), torch.float32)
    assert one.tolist() == [[1.0] * WIDTH]
    for row in (0, 2, -1):
        found = load_vector(VectorAt(file, "rows", row))
        assert found[0, 0] == WIDTH * (row % 3)
        assert found.untyped_storage().nbytes() == 4 * WIDTH
    assert load_soft_prompt(file).tolist() == [[0.5] * WIDTH] * 2


def test_a_file_with_one_tensor_needs_no_key(tmp_path, tiny_model):
    place = str(tmp_path / "single.safetensors")
    save_file({"any": torch.ones(WIDTH)}, place)
    table = ps.run(prepared_scope(place), model=tiny_model()).table()
    assert table["source_prompt"].tolist() == [place]
    assert table["source_position"].tolist() == table["source_token"].tolist() == [None]
    assert table["source_layer"].tolist() == [0]


def prepared_scope(place):
    return Patchscope(source=Source(vector=place, layer=0), target=Target(prompt="x is", position="x"))


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        pytest.param(
            {},
            "source.vector: {file} holds cube, number, one, rows, soft_prompt, wide, and not one tensor. "
            "Name one of them by key.",
            id="no key",
        ),
        pytest.param(
            {"key": "row"},
            "source.vector: {file} holds cube, number, one, rows, soft_prompt, wide, and not row. "
            "Name one of them by key.",
            id="missing key",
        ),
        pytest.param(
            {"key": "rows"},
            "source.vector: {file} holds a tensor of shape (3, 32). "
            "Name a row of a (n, d_model) matrix by index, or give a file with a (d_model,) vector.",
            id="a matrix without a row",
        ),
        pytest.param(
            {"key": "one", "index": 0},
            "source.vector: {file} holds a tensor of shape (32,). "
            "Name a row of a (n, d_model) matrix by index, or give a file with a (d_model,) vector.",
            id="a row of a vector",
        ),
        pytest.param(
            {"key": "number"},
            "source.vector: {file} holds a tensor of shape (). "
            "Name a row of a (n, d_model) matrix by index, or give a file with a (d_model,) vector.",
            id="a number",
        ),
        pytest.param(
            {"key": "cube", "index": 0},
            "source.vector: {file} holds a tensor of shape (1, 2, 32). "
            "Name a row of a (n, d_model) matrix by index, or give a file with a (d_model,) vector.",
            id="too many dimensions",
        ),
        pytest.param(
            {"key": "rows", "index": 3},
            "source.vector: row 3 is outside {file}, which has 3 rows. "
            "Rows are counted from 0; -1 is the last.",
            id="a row outside",
        ),
        pytest.param(
            {"key": "wide", "index": 1},
            "{file}:wide[1] is 33 wide; the states of LlamaForCausalLM are 32 wide. "
            "Use a vector that was made for this model.",
            id="wrong width",
        ),
    ],
)
def test_vectors_that_do_not_fit(vector, message, file, tiny_model):
    with pytest.raises(MappingError) as raised:
        prepared(tiny_model(), {"vector": {"file": file} | vector})
    assert str(raised.value) == message.format(file=file)


def test_files_that_cannot_be_read(tmp_path, tiny_model):
    with pytest.raises(
        MappingError, match=r"nowhere cannot be read: No such file or directory\. Check the path"
    ):
        prepared(tiny_model(), {"vector": str(tmp_path / "nowhere")})
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(
        MappingError, match=r"text is not a safetensors file: .*\. Write one with safetensors"
    ):
        prepared(tiny_model(), {"vector": str(tmp_path / "text")})


def test_a_column_that_holds_no_number(file, tiny_model):
    vector = {"file": file, "key": "rows", "index": "{n}"}
    found = prepared(tiny_model(), {"vector": vector}, rows=[{"n": 1}, {"n": "-1"}, {"n": " 2".strip()}])
    assert [at.row for at in found.sweep.vectors] == [1, -1, 2]
    for wrong in ("first", "1.5", "--1", ""):
        with pytest.raises(
            InputError, match=r"^source\.vector\.index: '.*' is not a whole number\. Give the number"
        ):
            prepared(tiny_model(), {"vector": vector}, rows=[{"n": wrong}])
    with pytest.raises(InputError, match=r"source\.vector\.index asks for the column 'n'"):
        prepared(tiny_model(), {"vector": vector}, rows=[{"m": 1}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "should have either a prompt or a vector from a file"),
        ({"prompt": "x", "vector": "f"}, "should have either a prompt or a vector from a file"),
        ({"vector": "f", "mean": "positions"}, "mean and minus need the states of a prompt"),
        ({"vector": "f", "minus": "x"}, "mean and minus need the states of a prompt"),
    ],
)
def test_a_source_has_one_origin(fields, message):
    with pytest.raises(SpecError, match=message):
        Source(**fields)


def test_a_vector_needs_a_target_prompt_and_names_its_reference(file, tiny_model):
    with pytest.raises(SpecError, match=r"a vector has no prompt of its own; give target\.prompt"):
        Patchscope(source=Source(vector=file))
    scope = Patchscope(
        source=Source(vector={"file": file, "key": "one"}),
        target=Target(prompt="x"),
        readout={"next_token": {"reference": "source"}},
    )
    with pytest.raises(
        InputError, match=r"needs one source prompt, and the source is a vector\. Name the reference"
    ):
        prepare(scope, model=tiny_model())


@pytest.mark.parametrize(
    ("tensors", "prompt", "message"),
    [
        (
            {"soft": torch.zeros(1, WIDTH)},
            "x",
            "holds soft, and not soft_prompt. Save the embeddings as soft_prompt.",
        ),
        (
            {"soft_prompt": torch.zeros(WIDTH)},
            "x",
            "holds a tensor of shape (32,). Save soft_prompt as (k, d_model), an embedding for each token.",
        ),
        (
            {"soft_prompt": torch.zeros(1, 8)},
            "x",
            (
                "is 8 wide; the states of LlamaForCausalLM are 32 wide. "
                "Use a vector that was made for this model."
            ),
        ),
        pytest.param(
            {"soft_prompt": torch.zeros(3, WIDTH)},
            "x is",
            "holds 3 embeddings, and target.prompt has 2 tokens. "
            "Give a target prompt with a token for each of them.",
        ),
    ],
    ids=["key", "shape", "width", "length"],
)
def test_soft_prompts_that_do_not_fit(tensors, prompt, message, tmp_path, tiny_model):
    place = str(tmp_path / "soft.safetensors")
    save_file(tensors, place)
    with pytest.raises(MappingError) as raised:
        prepared(tiny_model(), {"prompt": "Diana"}, prompt=prompt, position=-1, soft_prompt=place)
    assert str(raised.value).endswith(message)


def test_a_soft_prompt_is_as_long_as_the_prompts_that_have_it(tmp_path, tiny_model):
    """`text-only` has the source's own text, in which nothing is learned."""
    place = str(tmp_path / "soft.safetensors")
    save_file({"soft_prompt": torch.zeros(4, WIDTH)}, place)
    scope = Patchscope(
        source=Source(prompt="The", layer=0),
        target=Target(prompt="Diana", position={"start": 0}, soft_prompt=place),
    )
    table = ps.run(scope, model=tiny_model(), controls=["text-only"]).table()
    assert table["target_prompt"].tolist() == ["Diana", "The"]


def test_what_a_file_holds_tells_runs_apart(tmp_path, tiny_model):
    place = tmp_path / "v.safetensors"
    digests = []
    for value in (1.0, 2.0, 1.0):
        save_file({"v": torch.full((WIDTH,), value)}, place)
        digests.append(prepare(prepared_scope(str(place)), model=tiny_model()).digest)
    assert digests[0] == digests[2] != digests[1]
