"""The proof beyond the lengths that a config names: they are found, and what is wrong there is off there."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace

import hooks
import pytest
import registry
import registry_sizes
import tiny
import torch
import transformers
from plain import Plain

import patchscope_nn as ps
from patchscope_nn.errors import InputError
from patchscope_nn.models import PLAIN
from patchscope_nn.plan import plan
from patchscope_nn.proof import prove
from patchscope_nn.proof.prompts import thresholds
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import ATTENTION, MLP, Patchscope, Source, Target
from patchscope_nn.sweep import expand

SIZES = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": tiny.EOS_ID,
    "pad_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 8.0,
}
GPT_NEO = {
    **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "max_position_embeddings")},
    **{name: SIZES[name] for name in ("intermediate_size", "bos_token_id", "eos_token_id")},
    "num_layers": 4,
    "num_heads": 4,
    "window_size": 40,
    "attention_types": [[["global", "local"], 2]],
}
LLAMA4 = SIZES | {
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 300,
    "attn_temperature_tuning": True,
    "floor_scale": 50,
    "attn_scale": 0.5,
}
#: A config, the length beyond which it computes otherwise, and where its blocks are.
MODELS = {
    "window": ("MistralConfig", SIZES | {"sliding_window": 200}, 200, "model.layers"),
    "local attention": ("GPTNeoConfig", GPT_NEO, 40, "transformer.h"),
    "rotary factors": (
        "Phi3Config",
        SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 60},
        60,
        "model.layers",
    ),
    "temperature": ("Llama4TextConfig", LLAMA4, 50, "model.layers"),
}
READOUTS = {
    "next_token": NextToken(top_k=3),
    "generate": Generate(max_new_tokens=5),
    "choices": Choices([" Paris", "{c}"]),
    "hidden": Hidden(),
}


def make(name):
    config, options, _, _ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config)(**options), dtype=torch.float32
        )
    module.generation_config.eos_token_id = tiny.EOS_ID
    tiny._spread(module, 0)
    return module.eval()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A tiny model of a kind, proven."""
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path))
    return lambda name: ps.load(make(name), tokenizer=tiny.TOKENIZER)


@pytest.fixture(scope="module")
def proven():
    """proven(name): a model of a kind and its reference, made and proven once, to be looked at and run."""

    @functools.cache
    def get(name):
        model = ps.load(make(name), tokenizer=tiny.TOKENIZER)
        parts = map(model.info.architecture.part, (ATTENTION, MLP))
        attention, mlp = (part and part.path for part in parts)
        return model, hooks.Reference(make(name), blocks=MODELS[name][3], attention=attention, mlp=mlp)

    return get


#: Letters of which no two make a token.
_LETTERS = "abcdfghjkmnopqrsuvwyz"


def text(count, *, seed=0):
    """A text of so many tokens."""
    chooser = torch.Generator().manual_seed(1000 * seed + count)
    return "".join(_LETTERS[at] for at in torch.randint(len(_LETTERS), (count,), generator=chooser))


def row_of(source, target):
    return {"s": text(source), "t": f"{text(target - 3, seed=1)}x .", "c": text(target % 3 + 2, seed=2)}


def scope_of(readout):
    return Patchscope(
        source=Source(prompt="{s}", position=-1, layer=[0, 2]),
        target=Target(prompt="{t}", position=-3, layer=[1, 3]),
        readout=readout,
    )


def planned(model, readout, *rows):
    return plan(expand(scope_of(readout), rows=rows, source=model, target=model))


def entry(config, **options):
    return getattr(transformers, config)(**options)


ROPE = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 60}
THRESHOLDS = [
    (entry("MistralConfig", **SIZES | {"sliding_window": 200}), [200]),
    (entry("MistralConfig", **SIZES | {"sliding_window": 512}), []),
    (entry("LlamaConfig", **SIZES), []),
    (
        entry(
            "Qwen2Config",
            **SIZES | {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3},
        ),
        [100],
    ),
    (
        entry(
            "Qwen2Config",
            **SIZES | {"use_sliding_window": False, "sliding_window": 100, "max_window_layers": 28},
        ),
        [],
    ),
    (entry("GPTNeoConfig", **GPT_NEO), [40]),
    (entry("Llama4TextConfig", **LLAMA4), [50, 300]),
    (entry("RecurrentGemmaConfig", attention_window_size=128, num_hidden_layers=4), [128]),
    (entry("MixtralConfig", **SIZES | {"num_local_experts": 8, "sliding_window": None}), []),
    (entry("Gemma3TextConfig", **SIZES | {"sliding_window": 16, "head_dim": 8}), [16]),
    (entry("Gemma3Config", text_config=SIZES | {"sliding_window": 16, "head_dim": 8}), [16]),
    (
        entry(
            "Qwen2_5_VLConfig",
            text_config=SIZES | {"sliding_window": None},
            vision_config={"window_size": 112, "patch_size": 14},
        ),
        [],
    ),
    *(
        (entry("LlamaConfig", **SIZES | {"rope_parameters": ROPE | options}), [])
        for options in (
            {"rope_type": "yarn"},
            {"rope_type": "linear"},
            {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        )
    ),
    (
        entry("Phi3Config", **SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 60}),
        [60],
    ),
]


@pytest.mark.parametrize(
    ("config", "expected"), THRESHOLDS, ids=[f"{c.model_type}-{e}" for c, e in THRESHOLDS]
)
def test_thresholds(config, expected):
    """Windows, chunks and lengths of rotary embeddings; no number of layers, and nothing of images."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    model = SimpleNamespace(module=SimpleNamespace(config=config), info=SimpleNamespace(n_positions=most))
    # A family may change at the length itself, as Llama 4 does, or behind it.
    assert thresholds(model) == [length - 1 for length in expected]


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_of_a_length_are_tried(name, proven):
    length = MODELS[name][2]
    verdict = proven(name)[0].info.verdict
    assert verdict.limit is None
    tried = {entry.tokens for entry in verdict.comparisons}
    assert min(tried) < 24
    assert max(tried) > length
    assert {entry.beyond for entry in verdict.withheld} <= {length - 1}
    assert verdict.off(readout="generate", tokens=length - 1) == ()


def test_nothing_is_off_where_the_window_of_every_block_is_known(proven):
    assert proven("window")[0].info.verdict.withheld == ()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("local attention", {"prefix_sharing"}),
        ("rotary factors", {"mixed_lengths", "cached_decoding"}),
        ("temperature", {"mixed_lengths"}),
    ],
)
def test_what_is_wrong_beyond_a_length_is_off_there_alone(name, wrong, proven):
    length, (model, _) = MODELS[name][2], proven(name)
    withheld = model.info.verdict.withheld
    assert {entry.optimisation for entry in withheld} >= wrong
    short, long = row_of(8, 7), row_of(8, length + 2)
    before, beyond = (planned(model, NextToken(), short, other) for other in (row_of(9, 9), long))
    assert not before.withheld
    assert "is off" not in str(before)
    if model.info.architecture.packs:
        assert "clean prompts packed into" in str(before)
    assert f"is off beyond {length - 1} tokens" in str(beyond) or "is off for" in str(beyond)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("readout", READOUTS)
def test_cells_are_right_on_both_sides_of_a_length(name, readout, proven, run_cells):
    length = MODELS[name][2]
    rows = [
        *(row_of(8, 7), row_of(9, length - 2), row_of(length - 1, length)),
        *(row_of(length + 1, length + 1), row_of(length + 6, length + 5), row_of(6, length + 5)),
    ]
    scope, (model, reference) = scope_of(READOUTS[readout]), proven(name)
    pair = hooks.Pair(scope, reference, tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
    for some in (rows, rows[:2]):
        for cell, given in run_cells(scope, model, rows=some, controls=["unpatched"]):
            hooks.assert_same(given, pair.expected(cell, some[cell.row]))


@pytest.fixture
def cheap(monkeypatch):
    """Nothing beyond a length can be afforded."""
    monkeypatch.setattr(sys.modules[prove.__module__], "_AFFORDABLE", {"cpu": 0, "cuda": 0})


def test_what_was_not_tried_runs_on_the_plain_path(cheap, load, run_cells):
    model = load("window")
    verdict = model.info.verdict
    assert verdict.limit == 199
    assert not verdict.withheld
    assert max(entry.tokens for entry in verdict.comparisons) < 24
    reference = hooks.Reference(make("window"), blocks="model.layers", attention="self_attn", mlp="mlp")
    rows = [row_of(9, 210), row_of(230, 8), row_of(7, 205)]
    for readout in (READOUTS["next_token"], READOUTS["choices"]):
        pair = hooks.Pair(scope_of(readout), reference, tokenizer=tiny.TOKENIZER)
        said = str(planned(model, readout, *rows))
        for name in ("mixed-lengths", "prefix-sharing", "late-entry", "shared-attention", "cached-decoding"):
            assert f"{name} is off beyond 199 tokens (the proof tried no more than 199 tokens)" in said
        for cell, given in run_cells(scope_of(readout), model, rows=rows):
            hooks.assert_same(given, pair.expected(cell, rows[cell.row]))


def test_packed_passes_stay_within_what_was_tried(cheap, load):
    model = load("window")
    rows = [row_of(9 + place, 60) for place in range(30)]
    found = planned(model, READOUTS["next_token"], *rows)
    assert not found.withheld
    sizes = [
        target.layout.prefix + target.layout.n_tokens for step in found.steps() for target in step.targets
    ]
    assert len(sizes) > 1
    assert max(sizes) <= 199
    # A pass of one cell could hold its prompt twice.
    (said, *_) = planned(model, READOUTS["next_token"], row_of(9, 110)).withheld
    assert str(said) == "prefix-sharing is off beyond 99 tokens"


def test_prompts_that_are_wrong_on_the_plain_path_are_refused(load, monkeypatch):
    """As they would be if a family did something of its own beyond a length."""
    from patchscope_nn.body import batch

    true = batch.in_write

    def lost(value, *args):
        return true(value.clone() if value.shape[1] > 60 else value, *args)

    monkeypatch.setattr(batch, "in_write", lost)
    model = load("rotary factors")
    assert PLAIN in {entry.optimisation for entry in model.info.verdict.withheld}
    assert not planned(model, NextToken(), row_of(9, 20)).withheld
    for row in (row_of(9, 70), row_of(70, 9)):
        with pytest.raises(InputError, match="has more than 59 tokens") as caught:
            planned(model, NextToken(), row)
        assert "Use prompts of up to 59 tokens." in str(caught.value)


def test_a_prompt_read_in_both_directions(run_cells):
    """What follows is decoded token by token, as the model's own `generate` does."""
    module = registry.build("paligemma")
    plain = Plain(module, n_layers=registry_sizes.N_LAYERS, rereads=False)
    model = ps.load(module, tokenizer=tiny.TOKENIZER)
    assert not model.info.verdict.causal
    rows = [row_of(6, 7), row_of(8, 11)]
    assert "see those after them" in str(planned(model, READOUTS["generate"], *rows))
    for readout in (READOUTS["generate"], READOUTS["choices"]):
        for cell, given in run_cells(scope_of(readout), model, rows=rows):
            source, target, more = (
                tiny.TOKENIZER(rows[cell.row][name], add_special_tokens=False)["input_ids"] for name in "stc"
            )
            put = {"place": -3, "layers": [cell.target_layer]}
            put["states"] = plain.states(source)[[cell.source_layer]]
            if readout.name == "generate":
                tokens = given["token_ids"]
                logits = plain.follows(target, [tokens], **put)[0]
                assert tokens == logits[: len(tokens)].argmax(-1).tolist()
            else:
                logprobs = plain.follows(target, [more], **put)[0, :-1].log_softmax(-1)
                expected = logprobs[range(len(more)), more].sum().item()
                assert abs(given["choice_logprobs"][1] - expected) < 1e-3


def test_a_prompt_that_is_too_long_for_a_dynamic_rotary_embedding_is_told_why():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = entry("LlamaConfig", **SIZES | {"rope_parameters": rope, "max_position_embeddings": 20})
    dynamic = transformers.AutoModelForCausalLM.from_config(config)
    for module, why in ((dynamic, "its dynamic rotary embedding then depends on"), (make("window"), "")):
        model = ps.load(module, tokenizer=tiny.TOKENIZER, proof=False)
        longer = row_of(9, model.info.n_positions + 1)
        with pytest.raises(InputError, match="reads at most") as caught:
            planned(model, NextToken(), longer)
        assert ("dynamic" in str(caught.value)) == bool(why)
        assert why in str(caught.value)
        assert planned(model, NextToken(), row_of(9, model.info.n_positions))


def test_a_config_that_sets_no_limit_by_a_negative_number_sets_none():
    module = make("window")
    module.config.max_position_embeddings = -1  # as XLNet has it
    assert ps.load(module, tokenizer=tiny.TOKENIZER, proof=False).info.n_positions is None


def test_texts_of_a_trial_go_on_behind_the_ends_of_a_model():
    module = registry.build("phi3")
    ends = list(range(tiny.VOCAB_SIZE))
    module.generation_config.eos_token_id = ends
    verdict = prove(ps.load(module, tokenizer=tiny.TOKENIZER, proof=False), key="")
    off = {(entry.optimisation, entry.readout) for entry in verdict.withheld}
    assert ("cached_decoding", "generate") in off
    assert module.generation_config.eos_token_id == ends
