"""Where M and M* run, from the options that users give."""

from __future__ import annotations

import pytest

from patchscope_nn.backends import Bridged, Local, Ndif, Places, Rehearsal, Served
from patchscope_nn.errors import InputError
from patchscope_nn.runs.loading import load_models
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.spec import Patchscope, Source

URL = "https://ndif.example"
CASES = {
    "here": ((), Local(), Local()),
    "a rehearsal": (("local",), Rehearsal(), Rehearsal()),
    "a server": ((URL,), Ndif(URL), Ndif(URL)),
    "a server, spelt in two ways": ((URL, f"{URL}/"), Ndif(URL), Ndif(URL)),
    "M here, M* there": ((URL, False), Local(), Ndif(URL)),
    "M there, M* here": ((False, URL), Ndif(URL), Local()),
}


@pytest.mark.parametrize("case", CASES)
def test_options_name_two_places(case):
    given, source, target = CASES[case]
    places = Places.of(*given, dtype="float32")
    assert (places.source, places.target) == (source, target)
    assert places.backend == (target if source == target else Bridged(source, target))
    for side, place in (("source", source), ("target", target)):
        weights = not isinstance(place, Ndif)
        options = {"dtype": "float32", "device_map": None, "engine": "transformers", "weights": weights}
        assert places.loading(side, "a model") == options


def test_options_name_the_engine():
    places = Places.of(engine="vllm", source_engine="transformers", engine_args={"max_model_len": 64})
    assert not places.alike
    assert places.loading("target", "m") == {
        "dtype": "auto",
        "engine": "vllm",
        "max_model_len": 64,
        "weights": True,
    }
    assert places.loading("source", "m")["engine"] == "transformers"
    with pytest.raises(InputError, match="device_map belongs to the engine transformers"):
        Places.of(engine="vllm", device_map="auto").loading("target", "m")


@pytest.mark.parametrize(
    ("remote", "engine", "match"),
    [
        ("http://here", "vllm", "ndif runs models with transformers"),
        ("vllm+http://here", "transformers", "served runs models with vllm"),
        (False, "jax", "engine='jax' is not an engine"),
    ],
)
def test_a_place_runs_one_engine(remote, engine, match):
    with pytest.raises(InputError, match=match):
        Places.of(remote, engine=engine)
    assert isinstance(Places.of("vllm+http://here").target, Served)


def test_what_is_no_place():
    with pytest.raises(InputError, match="remote='there' is not a server"):
        Places.of("there")


def test_a_model_in_two_places_is_two(tiny_model):
    loaded = []

    def loader(model, **options):
        loaded.append(options["weights"])
        return tiny_model(copy=len(loaded))

    for remote, n_loaded in ((URL, [False]), (False, [True])):
        source, target = load_models(places=Places.of(remote), model="a/model", loader=loader)
        assert source is target
        assert loaded == n_loaded
        loaded.clear()
    source, target = load_models(places=Places.of(URL, source_remote=False), model="a/model", loader=loader)
    assert source is not target
    assert loaded == [True, False]


def test_what_is_prepared_holds_its_places(tiny_model):
    places = Places.of("local")
    prepared = prepare(Patchscope(source=Source(prompt="The city")), places=places, model=tiny_model())
    assert prepared.only.places is places
