"""A proof on a few blocks: it says what a proof on all of them says, and leaves the model as it is."""

from __future__ import annotations

import copy

import faults
import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn.errors import ModelError
from patchscope_nn.proof import checks
from patchscope_nn.proof.short import shortened

N_LAYERS = 7
pytestmark = pytest.mark.usefixtures("verdicts")


def load(module, **options):
    return ps.load(module, tokenizer=tiny.TOKENIZER, **options)


def deep(family):
    return tiny.make_module(family, n_layers=N_LAYERS)


def blocks_of(model):
    return {comparison.blocks for comparison in model.info.verdict.comparisons}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "qwen2"])
def test_blocks_that_are_alike_are_proven_on_a_few_of_them(family):
    model = load(deep(family))
    first, *others = model.info.verdict.comparisons
    assert (first.blocks, first.what) == (N_LAYERS, "all optimisations: next_token")
    assert {other.blocks for other in others} == {3}
    assert model.info.verdict.withheld == ()
    (whole,) = blocks_of(load(tiny.make_module(family)))
    assert whole == tiny.N_LAYERS  # of few blocks all are proven


def test_the_short_model_has_the_same_weights_and_leaves_the_model_as_it_is():
    module = deep("llama")
    before = copy.deepcopy(module.config.to_dict())
    model = load(module, proof=False)
    short = shortened(model, (0, 3, 6))
    assert module.config.to_dict() == before
    assert [block.self_attn.layer_idx for block in module.model.layers] == [*range(N_LAYERS)]
    assert [block.self_attn.layer_idx for block in short.module.model.layers] == [0, 1, 2]
    assert short.info.n_layers == short.module.config.num_hidden_layers == 3
    for place, layer in enumerate((0, 3, 6)):
        for own, weight in zip(
            short.module.model.layers[place].parameters(),
            module.model.layers[layer].parameters(),
            strict=True,
        ):
            assert own is weight


#: Faults like another one of tests/faults.py: `make test` leaves them to `make test-registry`.
ALIKE = ("shared decoding", "prefix", "late entry", "cache")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.registry if name in ALIKE else ()) for name in faults.FAULTS],
)
def test_a_fault_is_found_as_on_all_blocks(name, monkeypatch):
    fault = faults.FAULTS[name]
    fault.plant(monkeypatch)
    model = load(deep(fault.family))
    assert {entry.optimisation for entry in model.info.verdict.withheld} == fault.wrong
    assert blocks_of(model) == {N_LAYERS}


class Louder(torch.nn.Module):
    """An MLP with something of its own behind it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return 2 * self.inner(hidden)


def other_part(module):
    module.model.layers[2].mlp = Louder(module.model.layers[2].mlp)


def other_setting(module):
    module.model.layers[2].self_attn.scaling = 0.3


def other_size(module):
    mlp = module.model.layers[2].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(tiny.D_MODEL, 20, bias=False))
    mlp.down_proj = torch.nn.Linear(20, tiny.D_MODEL, bias=False)


def hooked(module):
    module.model.layers[2].register_forward_hook(lambda _module, _inputs, output: output)


@pytest.mark.parametrize("change", [other_part, other_setting, other_size, hooked])
def test_where_a_block_is_not_like_the_others_all_blocks_are_proven(change):
    module = deep("llama")
    change(module)
    model = load(module)
    assert blocks_of(model) == {N_LAYERS}
    assert model.info.verdict.withheld == ()


def test_numbers_that_are_not_finite_in_a_block_between_are_found():
    module = deep("llama")
    with torch.no_grad():
        module.model.layers[2].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(ModelError, match="not finite"):
        load(module)


def test_next_tokens_that_are_wrong_on_all_blocks_alone_are_found(monkeypatch):
    """The compiler is made wrong for models of many blocks only."""
    true = checks.Checks._error

    def wrong(self, trial, optimisations, **options):
        error, problem = true(self, trial, optimisations, **options)
        packed = optimisations.prefix_sharing and self.model.info.n_layers == N_LAYERS
        return (9.0, "differs by 9") if packed else (error, problem)

    monkeypatch.setattr(checks.Checks, "_error", wrong)
    model = load(deep("llama"))
    assert {entry.optimisation for entry in model.info.verdict.withheld} >= {"prefix_sharing"}
    assert blocks_of(model) == {N_LAYERS}
