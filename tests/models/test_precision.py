"""Other precisions and places of the weights: the same results as far as they go, and on the record."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import patchscope_nn as ps

SCOPE = ps.Patchscope(
    source=ps.Source(prompt="The Eiffel Tower is in", layer="all"),
    target=ps.Target(prompt="Diana is in Paris x ->", position="x", layer="all"),
    readout=ps.NextToken(top_k=3, reference="source"),
)
CONTROLS = ["unpatched", "random"]
#: How far a typical top log-probability may be off: 24, 8 and 11 bits, in a model with large weights.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.05}


def top_logprobs(run):
    return torch.tensor([math.log(row["top_probs"][0]) for row in run.rows])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_precision_is_kept_and_recorded(dtype, folder):
    run = ps.run(SCOPE, model=str(folder), dtype=dtype, controls=CONTROLS)
    assert run.manifest["models"]["source"]["dtype"] == run.manifest["models"]["target"]["dtype"] == dtype
    plain = ps.run(
        SCOPE, model=str(folder), dtype=dtype, controls=CONTROLS, optimisations=ps.Optimisations.none()
    )
    exact = ps.run(SCOPE, model=str(folder), dtype="float32", controls=CONTROLS)
    # A half-precision run differs from the exact one by its rounding; packed or not, by no more than that.
    for other in (plain, exact):
        error = (top_logprobs(run) - top_logprobs(other)).abs()
        assert error.median() < ROUNDING[dtype]
    assert all(math.isfinite(row["entropy_nats"]) for row in run.rows)


@pytest.mark.parametrize("readout", [SCOPE.readout, ps.Generate(max_new_tokens=4), ps.Choices([" is", "el"])])
def test_offloaded_weights_give_the_same(readout, folder, tmp_path):
    """Half of the blocks are on the disk, and come when they are called."""
    scope = SCOPE.model_copy(update={"readout": readout})
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer > 1 else "cpu" for layer in range(tiny.N_LAYERS)}
    model = ps.load(folder, device_map=places, offload_folder=tmp_path, dtype="float32")
    assert {weight.device.type for weight in model.module.parameters()} == {"cpu", "meta"}
    found = ps.run(scope, model=model, controls=CONTROLS)
    for given, expected in zip(
        found.rows, ps.run(scope, model=str(folder), controls=CONTROLS).rows, strict=True
    ):
        assert given.get("text") == expected.get("text")
        for name in ("top_probs", "choice_probs"):
            assert given.get(name) == (expected.get(name) and pytest.approx(expected[name], abs=1e-5))


def test_sdpa_is_the_default_attention(folder):
    assert ps.load(folder).module.config._attn_implementation == "sdpa"
    assert ps.load(folder, attn_implementation="eager").module.config._attn_implementation == "eager"
