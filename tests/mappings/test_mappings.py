"""Mappings: what they compute, and what does not fit between two hidden spaces."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from patchscope_nn.errors import MappingError, SpecError
from patchscope_nn.mappings import Affine, apply_mapping, resolve_mapping
from patchscope_nn.spec import Patchscope, Source, Target


@pytest.fixture
def info(tiny_model):
    return tiny_model("llama").info


@pytest.fixture
def wide(info):
    return replace(info, d_model=48, name="wide")


def double(states):
    return states * 2


def widen(states):
    return torch.cat([states, states[..., :16]], dim=-1)


def states_of(count, size, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_identity_writes_the_state(info):
    found = resolve_mapping("identity", source=info, target=info)
    states = states_of(3, 32)
    assert (found.name, found.kind, found.digest) == ("identity", "identity", "")
    assert torch.equal(apply_mapping(found.kind, found.call, states, torch.zeros(3, 32)), states)


def test_target_norm_keeps_the_direction_and_takes_the_norm(info):
    found = resolve_mapping("target_norm", source=info, target=info)
    states, clean = states_of(3, 32), 7 * states_of(3, 32, seed=1)
    mapped = apply_mapping(found.kind, found.call, states, clean)
    assert torch.allclose(mapped.norm(dim=-1), clean.norm(dim=-1))
    assert torch.allclose(torch.cosine_similarity(mapped, states), torch.ones(3))


@pytest.mark.parametrize("bias", [True, False])
def test_affine_is_its_formula(bias, info, wide, tmp_path):
    weight, offset = states_of(48, 32), states_of(1, 48)[0] if bias else None
    states, clean = states_of(3, 32, seed=2), torch.zeros(3, 48)
    expected = states @ weight.T + (offset if bias else 0)
    save_file({"weight": weight} | ({"bias": offset} if bias else {}), tmp_path / "w.safetensors")
    given = resolve_mapping(Affine(weight, offset), source=info, target=wide)
    loaded = resolve_mapping(("affine", str(tmp_path / "w.safetensors")), source=info, target=wide)
    assert (given.name, loaded.name) == ("affine", "affine:w.safetensors")
    assert given.digest == loaded.digest != ""
    for found in (given, loaded):
        assert torch.allclose(apply_mapping(found.kind, found.call, states, clean), expected, atol=1e-5)


def test_weights_are_copied():
    weight = torch.eye(2)
    mapping = Affine(weight)
    weight.zero_()
    assert torch.equal(mapping.weight, torch.eye(2))


@pytest.mark.quick
def test_a_module_and_a_function(info, wide):
    module = torch.nn.Linear(32, 48)
    states, clean = states_of(3, 32), torch.zeros(3, 48)
    found = resolve_mapping(module, source=info, target=wide)
    assert (found.name, found.kind) == ("Linear", "call")
    with torch.no_grad():
        assert torch.equal(apply_mapping(found.kind, found.call, states, clean), module(states))
    found = resolve_mapping(widen, source=info, target=wide)
    assert found.name == "widen"
    assert torch.equal(apply_mapping(found.kind, found.call, states, clean), widen(states))


def test_a_function_is_found_by_its_name(info, monkeypatch):
    module = types.ModuleType("maps_of_mine")
    module.double = double
    monkeypatch.setitem(sys.modules, "maps_of_mine", module)
    found = resolve_mapping(("function", "maps_of_mine:double"), source=info, target=info)
    assert (found.name, found.call) == ("double", double)


def test_what_is_mapped_takes_the_dtype_of_what_it_replaces(info):
    states, clean = states_of(2, 32), torch.zeros(2, 32, dtype=torch.bfloat16)
    for mapping in ("identity", "target_norm", double, Affine(torch.eye(32).double())):
        found = resolve_mapping(mapping, source=info, target=info)
        assert apply_mapping(found.kind, found.call, states, clean).dtype == torch.bfloat16


def scaled(by):
    return lambda states: states * by


def test_digests_tell_mappings_of_one_name_apart(info):
    mappings = [
        Affine(torch.eye(32)),
        Affine(2 * torch.eye(32)),
        double,
        lambda states: states + 1,
        lambda states: torch.sin(states) + 0,
        lambda states: torch.cos(states) + 0,
        scaled(2),
        scaled(3),
        scaled(torch.ones(32)),
        scaled(torch.zeros(32)),
        lambda states, by=2: states * by,
        lambda states, by=3: states * by,
    ]
    digests = [resolve_mapping(one, source=info, target=info).digest for one in mappings]
    assert len(set(digests)) == len(mappings)
    assert digests[6:8] == [resolve_mapping(scaled(by), source=info, target=info).digest for by in (2, 3)]


def test_the_digest_of_a_function_holds_no_address(info):
    """A function with a function inside is the same in another process: that is how a run is resumed."""
    code = "lambda states: [sum(part for part in [one]) for one in [states]][0]"
    first, second = (resolve_mapping(eval(code), source=info, target=info).digest for _ in range(2))  # noqa: S307
    assert first == second


@pytest.mark.parametrize("mapping", ["identity", "target_norm"])
def test_named_mappings_need_one_size(mapping, info, wide):
    with pytest.raises(MappingError) as raised:
        resolve_mapping(mapping, source=info, target=wide)
    assert str(raised.value) == (
        f"mapping: {mapping} needs hidden states of one size; the source's have 32 (LlamaForCausalLM), the "
        "target's 48 (wide). Give an affine mapping: {affine: weights.safetensors}."
    )


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        pytest.param(
            Affine(torch.eye(48)),
            r"mapping affine fails on states of shape \(2, 32\): .* It should map \(n, 32\) to \(n, 32\)\.$",
            id="wrong input",
        ),
        pytest.param(
            Affine(torch.zeros(48, 32)),
            r"mapping affine gives \(2, 48\) for states of shape \(2, 32\); should be \(2, 32\)\. It maps "
            r"LlamaForCausalLM \(d_model 32\) to LlamaForCausalLM \(32\)\.$",
            id="wrong output",
        ),
        pytest.param(
            lambda states: states.sum(0), r"gives \(32,\) for states of shape \(2, 32\)", id="wrong rank"
        ),
        pytest.param(lambda states: 3, r"gives int for states", id="no tensor"),
        pytest.param(
            lambda states: 1 / 0, r"fails on states of shape \(2, 32\): division by zero", id="fails"
        ),
    ],
)
def test_mappings_that_do_not_fit(mapping, message, info):
    with pytest.raises(MappingError, match=message):
        resolve_mapping(mapping, source=info, target=info)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        pytest.param(
            {"W": torch.eye(32)}, r"holds \['W'\]; it should hold 'weight' \(d_out, d_in\)", id="no weight"
        ),
        pytest.param(
            {"weight": torch.eye(32), "scale": torch.ones(1)}, r"holds \['scale', 'weight'\]", id="too much"
        ),
        pytest.param({"weight": torch.zeros(32)}, r"given \(32,\) and None", id="no matrix"),
        pytest.param(
            {"weight": torch.eye(32), "bias": torch.zeros(31)}, r"given \(32, 32\) and \(31,\)", id="bias"
        ),
    ],
)
def test_files_that_hold_no_affine(tensors, message, info, tmp_path):
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(MappingError, match=message):
        resolve_mapping(("affine", str(tmp_path / "w.safetensors")), source=info, target=info)


def test_files_that_cannot_be_read(info, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    for file in (broken, tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(MappingError) as raised:
            resolve_mapping(("affine", str(file)), source=info, target=info)
        assert raised.value.message.startswith(f"mapping.affine={str(file)!r} cannot be read: ")
        assert raised.value.hint == "Give a safetensors file."


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such_function"])
def test_functions_that_cannot_be_imported(name, info):
    with pytest.raises(
        MappingError, match=rf"^mapping\.function='{name}' cannot be imported: .* Write module:name"
    ):
        resolve_mapping(("function", name), source=info, target=info)


def test_a_name_that_is_no_function(info):
    with pytest.raises(MappingError, match="fails on states of shape"):
        resolve_mapping(("function", "math:pi"), source=info, target=info)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("identiy", "'identiy' is not a known mapping. Did you mean 'identity'?"),
        ({"affin": "w"}, "Did you mean 'affine'?"),
        ({"function": "maps"}, "function: 'maps' should be module:name, for example my_code:my_function"),
        (3, "3 is not a known mapping"),
    ],
)
def test_what_is_no_mapping(mapping, message):
    with pytest.raises(SpecError) as raised:
        Patchscope(source=Source(prompt="x"), target=Target(), mapping=mapping)
    assert message in str(raised.value)
