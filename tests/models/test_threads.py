"""Runs from several threads at once: each gives what it gives alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny

import patchscope_nn as ps
from patchscope_nn.fitting.trained.frozen import frozen

PROMPTS = ("The Eiffel Tower", "the city of Paris", "Diana is", "in the Tower ->")
N_THREADS = 4
TIMEOUT_S = 120


def scope(prompt, *, generate=False):
    return ps.Patchscope(
        source=ps.Source(prompt=prompt, layer="all"),
        target=ps.Target(prompt="Diana is x in", position="x", layer=[0, 2]),
        readout=ps.Generate(max_new_tokens=3) if generate else ps.NextToken(top_k=3, reference="source"),
    )


def results(prompt, **models):
    tables = [ps.run(scope(prompt, generate=way), controls=["random"], **models).table() for way in (0, 1)]
    return [table.drop(columns=["source_model", "target_model"]).to_dict("records") for table in tables]


@pytest.mark.parametrize("kind", ["one model", "two models", "one module, wrapped by each run"])
def test_runs_in_a_pool_equal_those_one_after_the_other(kind, tiny_model):
    if kind == "one model":
        models = {"model": tiny_model()}
    elif kind == "two models":
        models = {"source_model": tiny_model(seed=1), "target_model": tiny_model()}
    else:
        models = {"model": Wrapped(tiny.make_module("llama"))}
    expected = {prompt: results(prompt, **given(models)) for prompt in PROMPTS}
    start = threading.Barrier(N_THREADS)

    def together(number):
        start.wait(TIMEOUT_S)
        return [results(PROMPTS[(number + turn) % 4], **given(models)) for turn in range(3)]

    with ThreadPoolExecutor(N_THREADS) as pool:
        found = list(pool.map(together, range(N_THREADS), timeout=TIMEOUT_S))
    for number, runs in enumerate(found):
        assert runs == [expected[PROMPTS[(number + turn) % 4]] for turn in range(3)]


class Wrapped:
    """A transformers model, which each run is to wrap anew."""

    def __init__(self, module):
        self.module = module


def given(models):
    return {
        name: ps.load(model.module, tokenizer=tiny.TOKENIZER) if isinstance(model, Wrapped) else model
        for name, model in models.items()
    }


def test_a_pair_both_ways_round_does_not_wait_for_ever(tiny_model):
    first, second = tiny_model(), tiny_model(seed=1)
    pairs = [(first, second), (second, first)] * 2
    with ThreadPoolExecutor(N_THREADS) as pool:
        runs = pool.map(
            lambda pair: results(PROMPTS[0], source_model=pair[0], target_model=pair[1]),
            pairs,
            timeout=TIMEOUT_S,
        )
        found = list(runs)
    assert found[:2] == found[2:]


def test_a_run_waits_while_its_model_is_trained(tiny_model):
    model = tiny_model()
    with ThreadPoolExecutor(1) as pool:
        with frozen(model):
            waiting = pool.submit(results, PROMPTS[0], model=model)
            with pytest.raises(TimeoutError):
                waiting.result(0.5)
        assert waiting.result(TIMEOUT_S) == results(PROMPTS[0], model=model)
