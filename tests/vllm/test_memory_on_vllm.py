"""Keys and values: none of a patched prompt is used for another one, and none is computed again without it."""

from __future__ import annotations

import pytest
from one_table import assert_one_table

import patchscope_nn as ps
from patchscope_nn.body import contexts
from patchscope_nn.errors import ModelError, RunError
from patchscope_nn.models import preemptions

SHORT = {"max_model_len": 64}


def scope_of(readout, layer=1):
    return ps.Patchscope(
        source=ps.Source(prompt="Diana of Paris", position=-1, layer=[0, 1, 2, 3]),
        target=ps.Target(prompt="{t}", position=0, layer=layer),
        readout=readout,
    )


# Blocks are shared when they are full; this prompt fills several.
LONG = [{"t": "The Eiffel Tower is in the city of Paris, " * 3}]


def unpatched(model):
    table = ps.run(
        scope_of(ps.NextToken(), layer=[0]), model=model, data=LONG, controls=["unpatched"]
    ).table()
    return table[table["control"] == "unpatched"]["top_probs"].iloc[0], table


def test_a_patched_prompt_is_not_in_the_prefix_cache(engine_for, tiny_folder, monkeypatch):
    model = engine_for(tiny_folder("llama"), enable_prefix_caching=True, block_size=16, **SHORT)
    clean, _ = unpatched(model)
    assert unpatched(model)[0] == pytest.approx(clean)
    # Without a salt of its own, the patched prompt is cached, and the unpatched one is read from there.
    monkeypatch.setattr(contexts, "prompt_of", lambda request: {"prompt_token_ids": request["ids"]})
    poisoned, _ = unpatched(model)
    again, _ = unpatched(model)
    assert poisoned != pytest.approx(clean) or again != pytest.approx(clean)


def texts(model, **options):
    # Long texts of short prompts: all prompts fit at first, and their texts need more blocks later.
    scope = scope_of(ps.Generate(max_new_tokens=40), layer=[0, 1, 2, 3])
    return ps.run(scope, model=model, data=[{"t": "The city of x"}], **options).table()


@pytest.fixture(scope="module")
def small(tiny_folder):
    return tiny_folder("llama")


def test_steps_are_so_small_that_nothing_is_computed_again(small, engine_for):
    expected = texts(ps.load(str(small)))
    model = engine_for(small, num_gpu_blocks_override=9, block_size=16, **SHORT)
    assert model.info.held_tokens == 8 * 16
    assert_one_table(texts(model), expected)
    assert preemptions(model) == 0
    # Larger steps do not fit. The run notices, and halves them.
    found = texts(model, memory=2**40)
    assert preemptions(model) > 0
    assert_one_table(found, expected)


def test_a_text_that_never_fits_is_an_error(small, engine_for):
    with pytest.raises((ModelError, RunError), match="memory"):
        texts(engine_for(small, num_gpu_blocks_override=2, block_size=16, **SHORT))


@pytest.mark.parametrize("option", [{"enable_chunked_prefill": True}, {"disable_log_stats": True}])
def test_settings_that_hide_states_are_refused(option, small):
    with pytest.raises(ModelError, match=f"{next(iter(option))}=True .* Leave .* out"):
        ps.load(str(small), engine="vllm", **option)
