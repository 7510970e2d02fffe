"""Where M and M* run, from the options that users give."""

from __future__ import annotations

import pytest

from patchscope_nn.backends import Bridged, Local, Ndif, Places, Rehearsal
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
    for place in (source, target):
        weights = not isinstance(place, Ndif)
        assert places.loading(place) == {"dtype": "float32", "device_map": None, "weights": weights}


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
