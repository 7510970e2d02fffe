"""Keys and values of a patched prompt are not used for others, and not computed again without the patch."""

from __future__ import annotations

import pytest
from one_table import assert_one_table

import patchscope_nn as ps
from patchscope_nn.body import contexts
from patchscope_nn.errors import ModelError
from patchscope_nn.models import preemptions

SHORT = {"max_model_len": 64}


def scope_of(readout, layer=1):
    return ps.Patchscope(
        source=ps.Source(prompt="Diana of Paris", position=-1, layer=[0, 1, 2, 3]),
        target=ps.Target(prompt="{t}", position=0, layer=layer),
        readout=readout,
    )


def own_answer(model, ids):
    """What the engine answers to a request that is not traced, and that reads the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=3)
    (answer,) = model.traced.vllm_entrypoint.generate([{"prompt_token_ids": ids}], sampling)
    return {token: found.logprob for token, found in answer.outputs[0].logprobs[0].items()}


@pytest.mark.vllm_quick
def test_a_patched_prompt_is_not_in_the_prefix_cache(engine_for, tiny_folder, monkeypatch):
    model = engine_for(tiny_folder("llama"), enable_prefix_caching=True, block_size=32, **SHORT)
    # Blocks are shared when they are full; this prompt fills two.
    text = ", ".join(["The Eiffel Tower is in the city of Paris, Diana is in the city of Paris"] * 2)
    ids = model.tokenizer(text)["input_ids"]
    assert 33 < len(ids) < 60
    llm = model.traced.vllm_entrypoint

    def answer_after_a_patch():
        assert llm.reset_prefix_cache()
        ps.run(scope_of(ps.Generate(max_new_tokens=1)), model=model, data=[{"t": text}])
        return own_answer(model, ids)

    clean = own_answer(model, ids)
    assert answer_after_a_patch() == pytest.approx(clean, abs=1e-4)
    # Without a salt of its own, the patched prompt is cached, and the next request reads it from there.
    monkeypatch.setattr(contexts, "prompt_of", lambda request: {"prompt_token_ids": request["ids"]})
    assert answer_after_a_patch() != pytest.approx(clean, abs=1e-4)


def texts(model, **options):
    # Long texts of short prompts: all prompts fit at first, and their texts need more blocks later.
    scope = scope_of(ps.Generate(max_new_tokens=40), layer=[0, 1, 2, 3])
    return ps.run(scope, model=model, data=[{"t": "The city of x"}], **options).table()


@pytest.fixture(scope="module")
def small(tiny_folder):
    return tiny_folder("llama")


def test_steps_are_so_small_that_nothing_is_computed_again(small, engine_for):
    expected = texts(ps.load(str(small)))
    model = engine_for(small, num_gpu_blocks_override=9, block_size=32, **SHORT)
    assert model.info.held_tokens == 8 * 32
    assert_one_table(texts(model), expected)
    assert preemptions(model) == 0
    # Larger steps do not fit. The run notices, and halves them.
    found = texts(model, memory=2**40)
    assert preemptions(model) > 0
    assert_one_table(found, expected)


def test_an_engine_whose_memory_never_fits_a_text_is_refused(small):
    with pytest.raises(ModelError, match=r"vLLM could not load .* vLLM's own log says more"):
        ps.load(str(small), engine="vllm", num_gpu_blocks_override=2, block_size=32, **SHORT)


@pytest.mark.parametrize("option", [{"enable_chunked_prefill": True}, {"disable_log_stats": True}])
def test_settings_that_hide_states_are_refused(option, small):
    with pytest.raises(ModelError, match=f"{next(iter(option))}=True .* Leave .* out"):
        ps.load(str(small), engine="vllm", **option)
