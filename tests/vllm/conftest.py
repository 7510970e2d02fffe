"""A vLLM engine for the tests of this folder: in this process, or behind `patchscope serve`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import tiny

import patchscope_nn as ps
from patchscope_nn.models import builtin

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import on_cpu  # noqa: E402 (a module of this folder)

# This folder is called vllm too, but it is no package.
_SPEC = importlib.util.find_spec("vllm")
INSTALLED = _SPEC is not None and _SPEC.origin is not None
if INSTALLED:
    on_cpu.prepare()

#: The options of the engine that most tests share.
OPTIONS = {"engine": "vllm", "dtype": "float32", "max_model_len": 2048}


def pytest_collection_modifyitems(items):
    # Tests with an engine of their own run before the shared engine is loaded: each takes 2.5 GB.
    items.sort(key=lambda item: "engine" in getattr(item, "fixturenames", ()))
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            # vLLM's own warnings at import and load are not ours.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not INSTALLED:
                item.add_marker(pytest.mark.skip(reason="vLLM has an environment of its own: make test-vllm"))


@pytest.fixture(scope="session")
def here():
    """The builtin model on transformers."""
    return ps.load(builtin.NAME, dtype="float32")


@pytest.fixture(scope="session")
def engine(cache):
    """The builtin model on vLLM, in this process."""
    model = ps.load(builtin.NAME, **OPTIONS)
    yield model
    end(model)


@pytest.fixture
def engine_for(cache):
    """engine_for(folder, ...): a model on vLLM, in this process, until the test ends."""
    loaded = []

    def get(name, **options):
        loaded.append(ps.load(str(name), **OPTIONS | options))
        return loaded[-1]

    yield get
    for model in loaded:
        end(model)


def end(model):
    """End the processes of an engine."""
    model.traced.vllm_entrypoint.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder(family): a tiny random model of a family, saved, with heads as wide as vLLM's are."""

    def make(family, **options):
        place = tmp_path_factory.mktemp(family)
        tiny.make_module(family, d_model=256, **options).save_pretrained(place)
        tiny.make_tokenizer().save_pretrained(place)
        return place

    return make
