"""Published lenses, in the files their own packages write: each against its own formula."""

from __future__ import annotations

import pytest
import tiny
import torch
from lens_files import SIZE, numbers, write_jacobian_lens, write_tuned_lens

from patchscope_nn.errors import MappingError
from patchscope_nn.mappings.published import read_jacobian_lens, read_tuned_lens


@pytest.mark.parametrize("bias", [True, False])
def test_a_tuned_lens_is_its_formula(bias, tmp_path):
    """unembed(h + A h + b), with h of hidden_states[i], the input of block i."""
    translators = write_tuned_lens(tmp_path, bias=bias)
    found = read_tuned_lens(tmp_path)
    assert list(found) == [-1, 0, 1, 2]
    module = tiny.reference("llama").module
    ids = torch.tensor([tiny.TOKENIZER("The Eiffel Tower")["input_ids"]])
    with torch.no_grad():
        states = module(ids, output_hidden_states=True).hidden_states
        for number, translator in enumerate(translators):
            h, tensors = states[number][0], found[number - 1]
            ours = torch.nn.functional.linear(h, tensors["weight"], tensors.get("bias"))
            theirs = h + translator(h)
            assert torch.allclose(ours, theirs, atol=1e-5)
            read = [module.lm_head(module.model.norm(state)) for state in (ours, theirs)]
            assert torch.allclose(*read, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"0.weight": torch.zeros(2, 2)}, r"holds '0\.weight' of shape \(2, 2\)"),
        ({"9.bias": torch.zeros(SIZE)}, r"holds '9\.bias' of shape \(32,\)"),
        ({"input_translator": 3}, "holds 'input_translator' of shape None"),
    ],
)
def test_what_is_no_tuned_lens_says_so(changed, message, tmp_path):
    write_tuned_lens(tmp_path, **changed)
    with pytest.raises(MappingError, match=message):
        read_tuned_lens(tmp_path)


def test_a_tuned_lens_that_is_not_whole_says_so(tmp_path):
    write_tuned_lens(tmp_path, count=3)
    with pytest.raises(MappingError, match=r"params\.pt lacks the translator 3 of 4"):
        read_tuned_lens(tmp_path)
    (tmp_path / "params.pt").unlink()
    with pytest.raises(MappingError, match="cannot be read"):
        read_tuned_lens(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MappingError, match=r"has no config\.json"):
        read_tuned_lens(tmp_path)


def test_a_jacobian_lens_maps_by_its_matrices(tmp_path):
    jacobians = write_jacobian_lens(tmp_path / "lens.pt")
    found = read_jacobian_lens(tmp_path / "lens.pt")
    h = numbers(3, SIZE, seed=9)
    assert list(found) == [0, 2]
    for layer, tensors in found.items():
        assert set(tensors) == {"weight"}
        assert torch.allclose(
            torch.nn.functional.linear(h, tensors["weight"]), h @ jacobians[layer].float().T
        )


@pytest.mark.parametrize("changed", [{"J": {}}, {"J": [1]}, {"J": {"a": 1}}, {"d_model": 31}])
def test_what_is_no_jacobian_lens_says_so(changed, tmp_path):
    write_jacobian_lens(tmp_path / "lens.pt", **changed)
    with pytest.raises(MappingError, match="it should hold 'J'"):
        read_jacobian_lens(tmp_path / "lens.pt")


class Unsafe:
    """What a pickle may run when it is read."""

    def __reduce__(self):
        return (print, ("run",))


def test_a_file_that_runs_code_is_not_read(tmp_path):
    torch.save({"J": Unsafe()}, tmp_path / "lens.pt")
    with pytest.raises(MappingError, match="cannot be read"):
        read_jacobian_lens(tmp_path / "lens.pt")
    (tmp_path / "text.pt").write_text("no file of torch")
    with pytest.raises(MappingError, match="cannot be read"):
        read_jacobian_lens(tmp_path / "text.pt")
