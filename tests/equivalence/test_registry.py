"""Every model type that transformers loads as a language model: right in every cell, or refused by name.

`make test` runs one model type of each mechanism, `make test-registry` all.
"""

from __future__ import annotations

import pytest
import registry
import registry_check

#: One of each way in which a model's tokens depend on each other, and on what runs beside them.
MECHANISMS = {
    "gemma3_text": "sliding windows beside full attention",
    "gpt_neo": "local attention by a mask of its own",
    "llama4_text": "attention in chunks, and a temperature that counts positions",
    "phi3": "rotary factors chosen by the longest prompt of a pass",
    "deepseek_v3": "latent attention, groups of experts",
    "deepseek_v32": "attention to a few indexed tokens",
    "mixtral": "experts",
    "qwen3_next": "linear attention beside full attention",
    "mamba": "a recurrent state that is its cache",
    "jamba": "a recurrent state beside keys and values",
    "recurrent_gemma": "a recurrent state that it keeps itself",
    "rwkv": "a recurrent state that no mask holds back",
    "gemma3n_text": "several streams",
    "paligemma": "a prompt read in both directions",
    "bart": "the decoder of an encoder-decoder, which counts positions itself",
    "bert": "an encoder",
    "blip-2": "a model that needs an image",
}


NAMES = [
    pytest.param(name, marks=() if name in MECHANISMS else pytest.mark.registry) for name in registry.names()
]


@pytest.mark.filterwarnings(
    "ignore:Module .* has a submodule named:UserWarning"
)  # nnsight, of BERT and others
@pytest.mark.parametrize("name", NAMES)
def test_model_type(name):
    if name in registry.NOT_BUILT:
        pytest.skip(registry.NOT_BUILT[name])
    verdict = registry_check.check(name)
    if verdict.kind == "refused":
        assert name in registry.REFUSED, f"it should run, and is refused: {verdict.detail}"
    else:
        assert verdict.kind == "ok", verdict.detail
        assert name not in registry.REFUSED, "it runs: take it from the table"


def test_each_model_type_is_small():
    """Building all of them costs seconds, and most of the weights are the vocabulary."""
    sizes = {name: sum(w.numel() for w in registry.build(name).parameters()) for name in MECHANISMS}
    assert max(sizes.values()) < 200_000, sizes
