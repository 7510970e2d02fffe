"""Fitted mappings: the class, its file, and what does not fit a sweep."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import cloudpickle
import fits
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import patchscope_nn as ps
from patchscope_nn.errors import MappingError
from patchscope_nn.mappings import Fitted, Provenance, apply_mapping, resolve_mapping
from patchscope_nn.runs.prepare import prepare

PAIRS = [(-1, 0), (0, 2), (0, 3), (2, 3)]
FORMS = ("weight", "up", "scale")


@pytest.fixture
def info(tiny_model):
    return tiny_model("llama").info


def states_of(count, size=32, seed=1):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_state_is_mapped_by_its_own_pair(form, bias, info):
    fitted = fits.random_fit(PAIRS, form=form, bias=bias)
    found = resolve_mapping(fitted, source=info, target=info, pairs=PAIRS)
    states, pairs = states_of(6), [PAIRS[place] for place in (3, 0, 3, 1, 2, 0)]
    given = apply_mapping(found.kind, found.within(pairs), states, torch.zeros(6, 32), torch.tensor(pairs))
    for place, pair in enumerate(pairs):
        expected = fits.formula(fitted, pair)(states[place])
        assert torch.allclose(given[place], expected, atol=1e-6)
        assert torch.allclose(fitted(states[place], *pair), expected, atol=1e-6)
    assert len({tuple(row.tolist()) for row in given}) == 6


@pytest.mark.parametrize("form", FORMS)
def test_a_file_holds_all_of_it(form, tmp_path):
    about = {
        "data": {"fit": {"n_texts": 3}},
        "settings": {"lambda": 0.1},
        "held_out": {(0, 2): {"fraction_of_variance": 0.5, "cosine": 0.25, "n": 7}},
        "seed": 4,
        "command": "patchscope fit affine",
    }
    fitted = fits.random_fit(PAIRS, form=form, **about)
    file = fitted.save(tmp_path / "new" / "fit.safetensors")
    assert [one.name for one in file.parent.iterdir()] == ["fit.safetensors"]
    loaded = Fitted.load(file)
    assert (loaded.kind, loaded.about, loaded.pairs) == (fitted.kind, fitted.about, tuple(PAIRS))
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()["patchscope_nn"])
        assert {key.split(".", 1)[1] for key in opened.keys()} == {"-1.0", "0.2", "0.3", "2.3"}  # noqa: SIM118
    assert said["source_model"] == {
        "name": "LlamaForCausalLM",
        "d_model": 32,
        "revision": None,
        "dtype": "float32",
        "site": "residual",
    }
    assert said["pairs"] == [[-1, 0], [0, 2], [0, 3], [2, 3]]
    assert said["held_out"] == [[0, 2, {"fraction_of_variance": 0.5, "cosine": 0.25, "n": 7}]]
    assert said["versions"]["torch"] == torch.__version__
    assert Fitted.load(file, pairs=[(0, 3)]).pairs == ((0, 3),)


def test_weights_are_copied():
    weight = torch.eye(32)
    about = Provenance(source_model=fits.space(32), target_model=fits.space(32))
    fitted = Fitted(kind="affine", maps={(0, 0): {"weight": weight}}, about=about)
    weight.zero_()
    assert torch.equal(fitted.parts((0, 0))["weight"], torch.eye(32))


NAN = torch.full((32,), torch.nan)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        pytest.param({}, r"the map of 0:3 has \[\]; it should have 'weight'", id="nothing"),
        pytest.param({"bias": torch.ones(32)}, r"has \['bias'\]", id="bias alone"),
        pytest.param(
            {"weight": torch.eye(32), "scale": torch.ones(1)}, r"has \['scale', 'weight'\]", id="two forms"
        ),
        pytest.param({"up": torch.ones(32, 2)}, r"has \['up'\]", id="half"),
        pytest.param(
            {"weight": torch.ones(32, 31)},
            r"weight of 0:3 has shape \(32, 31\); should be \(32, 32\): it maps LlamaForCausalLM",
            id="weight",
        ),
        pytest.param(
            {"up": torch.ones(32, 2), "down": torch.ones(3, 32)}, r"should be \(32, 3\)", id="two ranks"
        ),
        pytest.param({"scale": torch.ones(2)}, r"should be \(1,\)", id="scale"),
        pytest.param({"scale": torch.ones(1), "bias": NAN}, "bias of 0:3 holds values that are no", id="nan"),
    ],
)
def test_tensors_that_make_no_map(parts, message):
    about = Provenance(source_model=fits.space(32), target_model=fits.space(32))
    with pytest.raises(MappingError, match=message):
        Fitted(kind="affine", maps={(0, 3): parts}, about=about)


def test_what_makes_no_mapping():
    about = Provenance(source_model=fits.space(32), target_model=fits.space(48))
    with pytest.raises(MappingError, match="at least one pair"):
        Fitted(kind="affine", maps={}, about=about)
    with pytest.raises(MappingError, match=r"between spaces of one size; .* Fit an affine map instead"):
        Fitted(kind="scale", maps={(0, 0): {"scale": torch.ones(1)}}, about=about)


def test_files_that_hold_no_fitted_mapping(tmp_path, info):
    bare = tmp_path / "bare.safetensors"
    save_file({"weight": torch.eye(32)}, bare)
    with pytest.raises(
        MappingError, match=r"does not say what it was fitted on\. .* goes into \{affine: file\}"
    ):
        resolve_mapping(("fitted", str(bare)), source=info, target=info)
    for said in ("{", "[]", '{"pairs": 3, "kind": "affine"}', '{"pairs": [], "kind": "affine"}'):
        save_file({"weight.0.0": torch.eye(32)}, bare, metadata={"patchscope_nn": said})
        with pytest.raises(MappingError, match=r"metadata that cannot be read|at least one pair"):
            Fitted.load(bare)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    for file in (broken, tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(MappingError, match=r"cannot be read: .*`patchscope fit` wrote"):
            Fitted.load(file)


def test_a_sweep_needs_a_map_for_each_of_its_pairs(tmp_path, tiny_model):
    file = fits.random_fit(PAIRS).save(tmp_path / "fit.safetensors")
    scope = ps.Patchscope(
        source=ps.Source(prompt="Diana", layer=[0, 1]),
        target=ps.Target(prompt="x", layer=[2, 3]),
        mapping={"fitted": str(file)},
    )
    with pytest.raises(MappingError) as raised:
        prepare(scope, model=tiny_model())
    assert str(raised.value) == (
        f"mapping.fitted={str(file)!r} has no map for (l:l*) 1:2, 1:3. It has maps for (l:l*) embed:0, "
        "0:2, 0:3, 2:3."
    )
    given = scope.model_copy(update={"mapping": fits.random_fit(PAIRS)})
    with pytest.raises(
        MappingError, match=r"^mapping fitted has no map for \(l:l\*\) 1:2, 1:3\. It has maps"
    ):
        prepare(given, model=tiny_model())


def test_models_it_was_not_fitted_for(info):
    fitted = fits.random_fit(PAIRS)
    wide = replace(info, d_model=48)
    with pytest.raises(
        MappingError,
        match=r"mapping fitted was fitted for the target LlamaForCausalLM \(d_model 32\), site residual; "
        r"this run's is LlamaForCausalLM \(d_model 48\), site residual\. Fit one",
    ):
        resolve_mapping(fitted, source=info, target=wide, pairs=PAIRS)
    with pytest.raises(MappingError, match=r"this run's is .*, site mlp"):
        resolve_mapping(fitted, source=info, target=info, pairs=PAIRS, sites=("mlp", "residual"))
    assert resolve_mapping(fitted, source=info, target=info, pairs=PAIRS).notices == ()
    other = replace(info, name="another", revision="abc")
    (said,) = resolve_mapping(fitted, source=other, target=info, pairs=PAIRS).notices
    assert said == (
        "mapping fitted was fitted for the source LlamaForCausalLM (d_model 32); this run's is another at "
        "abc (d_model 32). Unless these have the same weights, it is applied to states unlike those it was "
        "fitted on."
    )


def test_digests_are_of_the_maps_that_are_used(info):
    one, other = fits.random_fit(PAIRS), fits.random_fit(PAIRS, seed=1)
    more = Fitted(kind="x", maps={pair: one.parts(pair) for pair in PAIRS[:3]}, about=one.about)
    pairs = {"pairs": PAIRS[:2], "source": info, "target": info}
    assert resolve_mapping(one, **pairs).digest == resolve_mapping(more, **pairs).digest
    assert resolve_mapping(one, **pairs).digest != resolve_mapping(other, **pairs).digest
    assert resolve_mapping(one, **pairs).about["pairs"] == [[-1, 0], [0, 2]]


def test_a_run_says_which_fit_it_used(tmp_path, tiny_model):
    held = {(0, 2): {"cosine": 0.5}, (2, 3): {"cosine": 0.25}}
    file = fits.random_fit(PAIRS, held_out=held).save(tmp_path / "fit.safetensors")
    scope = ps.Patchscope(
        source=ps.Source(prompt="Diana", layer=0),
        target=ps.Target(prompt="x", layer=[2, 3]),
        mapping={"fitted": str(file)},
    )
    run = ps.run(scope, model=tiny_model())
    said = run.manifest["mapping"]
    assert said["name"] == "fitted:fit.safetensors"
    assert said["fit"]["pairs"] == [[0, 2], [0, 3]]
    assert said["fit"]["held_out"] == [[0, 2, {"cosine": 0.5}]]
    assert set(run.table()["mapping"]) == {"fitted:fit.safetensors"}


def test_a_fitted_mapping_inside_a_users_module_travels_to_where_the_package_is_missing(tmp_path):
    class Inside(torch.nn.Module):
        def __init__(self, fitted, affine):
            super().__init__()
            self.fitted, self.affine = fitted, affine

        def forward(self, states):
            return self.affine(self.fitted(states, 0, 1))

    space = ps.Space(name="a", d_model=2)
    about = ps.Provenance(source_model=space, target_model=space)
    fitted = Fitted(kind="scale", maps={(0, 1): {"scale": torch.tensor([2.0])}}, about=about)
    package = sys.modules["patchscope_nn"]
    cloudpickle.register_pickle_by_value(package)
    try:
        (tmp_path / "module").write_bytes(cloudpickle.dumps(Inside(fitted, ps.Affine(torch.eye(2)))))
    finally:
        cloudpickle.unregister_pickle_by_value(package)
    code = (
        "import pickle, sys, torch; sys.modules['patchscope_nn'] = sys.modules['lazy_loader'] = None; "
        "print(pickle.load(open('module', 'rb'))(torch.ones(2)).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[2.0, 2.0]\n", "")
