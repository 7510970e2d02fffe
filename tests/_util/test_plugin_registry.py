"""Registries: entry points are found lazily, a name belongs to one package, and a broken one is alone."""

from __future__ import annotations

import sys

import pytest

from patchscope_nn._util.functions import function_bytes
from patchscope_nn._util.registry import Plugin, Registry

GROUP = "patchscope_nn.tested"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(package, source, **names): an installed package, as its metadata says."""

    def make(package, source, **names):
        place = tmp_path / package
        info = place / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {package}_code:{value}" for name, value in names.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
        (place / f"{package}_code.py").write_text(source)
        monkeypatch.syspath_prepend(place)

    yield make
    for name in [name for name in sys.modules if name.endswith("_code")]:
        del sys.modules[name]


def registry(**entries):
    return Registry(GROUP, noun="thing", entries=entries)


def test_a_package_is_imported_when_its_entry_is_used(install):
    install("first", "value = 1\n", one="value")
    install("second", "raise RuntimeError('no licence')\n", two="value")
    things = registry(ours=0)
    assert things.find("ours") == 0
    assert things.names() == ["ours", "two", "one"]
    assert "two" in things
    assert not {"first_code", "second_code"} & set(sys.modules)
    assert things.find("one") == 1
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is what is tested)
        things.find("two")
    assert str(caught.value) == (
        "the thing 'two' of the package second 1.0 cannot be loaded: RuntimeError: no licence"
    )
    assert things.load_all() == {"ours": 0, "one": 1}


def test_an_unknown_name_is_told_the_nearest(install):
    install("first", "value = 1\n", one="value")
    with pytest.raises(
        ValueError, match=r"^'onne' is not a known thing\. Did you mean 'one'\? Allowed: a, one\.$"
    ):
        registry(a=0).find("onne")


def test_a_name_of_two_packages_names_both(install):
    install("first", "value = 1\n", one="value", other="value")
    install("second", "value = 2\n", one="value")
    things = registry()
    with pytest.raises(
        ValueError, match=r"two packages, second 1\.0 and first 1\.0; uninstall one, or name the function"
    ):
        things.find("one")
    assert things.find("other") == 1


def test_ours_and_a_scripts_names_are_not_taken_by_a_package(install):
    install("first", "value = 1\n", one="value", ours="value", mine="value")
    things = registry(ours=0)
    assert things.find("ours") == 0
    with pytest.raises(
        ValueError, match=r"of script:mine has the same name as that of the package first 1\.0; give it"
    ):
        things.register("mine", 5, home="script:mine")
    assert list(things.plugins()) == [
        Plugin("one", "first 1.0", ""),
        Plugin("ours", "first 1.0", "it has the same name as the thing of patchscope_nn, which is used"),
        Plugin("mine", "first 1.0", ""),
    ]


def test_a_package_may_register_its_entry_itself(install):
    install(
        "first",
        "import holder\nholder.things.register('one', 7, home='first_code:value')\nvalue = 1\n",
        one="value",
    )
    things = registry()
    sys.modules["holder"] = type(sys)("holder")
    sys.modules["holder"].things = things
    assert things.find("one") == 7
    assert list(things.plugins()) == [Plugin("one", "first 1.0", "")]
    del sys.modules["holder"]


LIMIT = 3


def helper(text):
    return len(text) > LIMIT


def calls(text):
    return helper(text)


def test_what_a_function_computes_counts_with_the_helpers_of_its_module(monkeypatch):
    before = function_bytes(calls)
    assert function_bytes(calls) == before
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 4)
    changed = function_bytes(calls)
    assert changed != before
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda text: len(text) >= 4)
    assert function_bytes(calls) not in (before, changed)
