"""Every recipe that ships: what its file must have, and that it gives one table however it is run.

The tables are of a tiny random model with the builtin model's tokenizer, so that every prompt and position is
the one of the real run and takes a moment.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file

import patchscope_nn as ps
from patchscope_nn.models import builtin, load
from patchscope_nn.plan import Optimisations
from patchscope_nn.readouts import Generate
from patchscope_nn.recipe import Recipe, dump, find, lint, load_recipe, shipped
from patchscope_nn.runs.experiments import compare_runs
from patchscope_nn.spec import Fit, Train

D_MODEL, N_LAYERS = 32, 4
#: Two runs of one cell differ by rounding; so do the numbers made of it.
CLOSE = {"rtol": 1e-3, "atol": 2e-3}
#: Controls that a recipe cannot have.
WITHOUT = {
    "attention-knockout": {"shuffled"},  # no state is written
    "activation-difference": {"text-only"},  # a mean of rows has no text
    "direction-explanation": {"text-only"},  # nor has a vector
    "linear-probe": {"unpatched", "text-only"},  # there is no T
}
ALL = {"unpatched", "random", "shuffled", "text-only"}


def each(recipe):
    """The recipe of each method by name, or the recipe itself."""
    return recipe.of_methods() or {"": recipe}


@pytest.mark.quick
@pytest.mark.parametrize("name", shipped())
def test_a_recipe_that_ships(name):
    assert lint(name) == []
    lines = find(name).read_text("utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    assert len(lines) < 30
    assert max(map(len, lines)) <= 120
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.title.endswith(("?", ")"))
    assert recipe.paper
    assert recipe.data
    assert recipe.model == builtin.NAME
    assert set(next(iter(each(recipe).values())).controls) == ALL - WITHOUT.get(name, set())


@pytest.fixture(scope="module")
def tokenizer():
    if builtin.weights_file() is None:
        pytest.skip(f"the builtin model's tokenizer is absent: {builtin.INSTALL}")
    return load(builtin.NAME, weights=False).tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return load(transformers.LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


def narrowed(recipe, folder):
    """The recipe at layers that a tiny model has, with short texts and small fits."""
    raw = dump(recipe)
    target = raw.get("target", {})
    raw["source"]["layer"] = [0, 2]
    if target.get("layer", "same") not in ("same", -1, "embed", 1):
        target["layer"] = [1, 3]
    if isinstance(recipe.readout, Generate):
        raw["readout"]["generate"]["max_new_tokens"] = 3
    if isinstance(recipe.mapping, Fit):
        raw["mapping"]["fit"] |= {"limit": 12, "max_tokens": 24}
    if isinstance(recipe.mapping, Train) and recipe.mapping.steps:
        raw["mapping"]["train"] |= {"steps": 2, "batch": 2}
        raw["mapping"]["train"] |= {"limit": 12} | ({"max_tokens": 24} if recipe.mapping.max_tokens else {})
    if recipe.source.vector:
        vectors = torch.randn(16, D_MODEL, generator=torch.Generator().manual_seed(0))
        save_file({"vectors": vectors}, folder / "vectors.safetensors")
        raw["source"]["vector"]["file"] = str(folder / "vectors.safetensors")
    return Recipe(**raw)


def tables(name, model, folder, **options):
    """What each method of a recipe finds on a few rows: its run, and its table."""
    runs = {
        method: ps.run(narrowed(one, folder), model=model, limit=9 if one.probe else 2, **options)
        for method, one in each(load_recipe(name)).items()
    }
    return runs, {method: run.table() for method, run in runs.items()}


def alike(first, second):
    assert first.keys() == second.keys()
    for method, one in first.items():
        other = second[method]
        assert one["error"].isna().all()
        assert other["error"].isna().all()
        for column in one.columns:
            compare(one[column], other[column])


def compare(one, other):
    if one.dtype.kind in "fiu":
        torch.testing.assert_close(
            torch.tensor(one.to_numpy(float)), torch.tensor(other.to_numpy(float)), equal_nan=True, **CLOSE
        )
        return
    for left, right in zip(one, other, strict=True):
        if isinstance(left, list) and left and not isinstance(left[0], str):
            torch.testing.assert_close(torch.tensor(left).double(), torch.tensor(right).double(), **CLOSE)
        else:
            assert left is right or left == right or (left != left and right != right)  # noqa: PLR0124 (NaN)


@pytest.mark.real
@pytest.mark.parametrize("name", shipped())
def test_a_recipe_gives_one_table(name, model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path))
    runs, local = tables(name, model, tmp_path)
    assert all(len(table) for table in local.values())
    if len(runs) > 1:
        assert compare_runs(runs).names == tuple(runs)
    alike(local, tables(name, model, tmp_path, remote="local")[1])
    alike(local, tables(name, model, tmp_path, optimisations=Optimisations.none())[1])
