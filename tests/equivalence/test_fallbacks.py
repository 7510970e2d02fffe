"""Architectures that cannot be run on segments: a recurrent state, and one that keeps no keys and values."""

from __future__ import annotations

import hooks
import pytest
import tiny
import torch
import transformers

from patchscope_nn.errors import InputError
from patchscope_nn.models import load
from patchscope_nn.plan import Optimisations, count, plan
from patchscope_nn.readouts import Choices, Generate, NextToken
from patchscope_nn.spec import Patchscope, Source, Target
from patchscope_nn.sweep import expand

ROWS = ({"s": "The Eiffel Tower is in", "t": "Diana is in x ->"}, {"s": "Paris", "t": "The Tower of x in"})
READOUTS = {
    "next_token": NextToken(top_k=3, reference="source"),
    "generate": Generate(max_new_tokens=4),
    "choices": Choices([" Paris", " the city", " is"]),
}


def make(config, **options):
    common = {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 4}
    ids = {"pad_token_id": 2, "eos_token_id": tiny.EOS_ID, "bos_token_id": 0}
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**common, **ids, **options)
    )
    tiny._spread(made, 0)
    return made.eval()


MODELS = {
    "mamba": ("MambaConfig", {"state_size": 8}, "backbone.layers"),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **dict.fromkeys(("num_attention_heads", "linear_num_value_heads", "num_experts"), 4),
            **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok"), 2),
            **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
            **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
            "intermediate_size": 48,
        },
        "model.layers",
    ),
}


def scope_of(readout):
    return Patchscope(
        source=Source(prompt="{s}", layer=[0, 2]),
        target=Target(prompt="{t}", position="x", layer=["embed", 1, -1]),
        readout=readout,
    )


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("readout", READOUTS)
def test_it_falls_back_by_itself(family, readout, run_cells):
    config, options, blocks = MODELS[family]
    model, scope = load(make(config, **options), tokenizer=tiny.TOKENIZER), scope_of(READOUTS[readout])
    reference = hooks.Reference(make(config, **options), blocks=blocks, attention="", mlp="")
    pair = hooks.Pair(scope, reference, tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
    # A linear attention sums in chunks: padding moves its rounding beyond the tolerance, so it gets none.
    rows = ROWS if family == "mamba" else ROWS[:1]
    for remote in (False, "local"):
        found = run_cells(scope, model, rows=rows, controls=["unpatched"], remote=remote)
        for cell, given in found:
            hooks.assert_same(given, pair.expected(cell, rows[cell.row]))
    plain = run_cells(scope, model, rows=rows, controls=["unpatched"], optimisations=Optimisations.none())
    for (_, given), (_, expected) in zip(found, plain, strict=True):
        hooks.assert_same(given, expected)


def test_a_plan_says_so_and_counts_what_is_read_again():
    config, options, _ = MODELS["mamba"]
    model = load(make(config, **options), tokenizer=tiny.TOKENIZER)
    scope = scope_of(READOUTS["generate"])
    sweep = expand(scope, rows=ROWS[:1], source=model, target=model)
    planned = plan(sweep)
    assert "the blocks of mamba cannot be run on segments of a sequence" in str(planned)
    assert "mamba keeps no keys and values" in str(planned)
    width = len(sweep.target_prompts[0].ids)
    assert count(planned).readout_tokens == 6 * sum(width + place for place in (1, 2, 3))
    with pytest.raises(InputError, match="decodes from keys and values, and mamba keeps none"):
        plan(sweep, context="fused")
