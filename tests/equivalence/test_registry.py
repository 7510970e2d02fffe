"""Every model type that transformers loads as a language model: right in every cell, or refused by name.

`make test` runs one model type of each mechanism, `make test-registry` the others.
"""

from __future__ import annotations

import hooks
import pytest
import registry
import registry_check
import tiny
import torch
import transformers
from plain import Plain

from benchmarks import architectures

#: One of each way in which a model's tokens depend on each other, and on what runs beside them.
MECHANISMS = {
    "gemma3_text": "sliding windows beside full attention",
    "gemma4_text": "blocks that cut off tokens which are not unembedded",
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
    "whisper": "positions that count padding, but only where it decodes",
    "bert": "an encoder",
    "blip-2": "a model that needs an image",
}

PAGE = architectures.PAGE.read_text(encoding="utf-8")
VERSION = architectures.version_of(PAGE)
KNOWN = registry.names()
#: Model types that an older transformers does not know are skipped by name, also in `make test-oldest`.
NAMES = [
    pytest.param(name, marks=pytest.mark.registry if name in KNOWN and name not in MECHANISMS else ())
    for name in dict.fromkeys([*KNOWN, *MECHANISMS, *architectures.read(PAGE)])
]
#: nnsight says of BERT and others that a part of them has the name of one of its own attributes.
NAMESAKES = pytest.mark.filterwarnings("ignore:Module .* has a submodule named:UserWarning")


@NAMESAKES
@pytest.mark.parametrize("name", NAMES)
def test_model_type(name):
    if name not in KNOWN:
        pytest.skip(f"transformers {transformers.__version__} does not know {name}")
    if name in registry.NOT_BUILT:
        pytest.skip(registry.NOT_BUILT[name])
    verdict = registry_check.check(name)
    if verdict.kind == "refused":
        assert name in registry.REFUSED, f"it should run, and is refused: {verdict.detail}"
    else:
        assert verdict.kind == "ok", verdict.detail
        assert name not in registry.REFUSED, "it runs: take it from the table"


@pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"docs/architectures.md is about transformers {VERSION}"
)
class TestPage:
    """docs/architectures.md says what the command would write today."""

    @NAMESAKES
    @pytest.mark.parametrize("name", NAMES)
    def test_row(self, name):
        found, written = architectures.family_of(name), architectures.read(PAGE).get(name)
        assert written == found, "run python -m benchmarks.architectures"

    def test_has_every_model_type_and_nothing_else(self):
        families = architectures.read(PAGE)
        assert sorted(families) == sorted(KNOWN)
        assert architectures.page_of(families) == PAGE, "run python -m benchmarks.architectures"


def test_each_model_is_small_and_the_same_again():
    """Most of the weights are the vocabulary, so building all of them costs seconds."""
    for name in set(MECHANISMS) & set(KNOWN):
        weights = torch.cat([weight.flatten() for weight in registry.build(name).parameters()])
        assert len(weights) < 200_000, name
        again = torch.cat([weight.flatten() for weight in registry.build(name).parameters()])
        assert torch.equal(weights, again), name


@pytest.mark.parametrize("rereads", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_reference_is_that_of_given_paths(family, rereads):
    """The reference finds the blocks, and both of its ways to read on behind a prompt agree here."""
    given, plain = (
        tiny.reference(family),
        Plain(tiny.make_module(family), n_layers=tiny.N_LAYERS, rereads=rereads),
    )
    source, prompt, more = [5, 9, 30, 7], [8, 40, 12, 9, 33], [11, 50]
    states = plain.states(source)
    layers = range(tiny.N_LAYERS)
    for layer in layers:
        found = given.state(source, hooks.Site(layer), [-1])[0]
        torch.testing.assert_close(states[layer], found)
    follows = plain.follows(prompt, [more] * len(states), place=-2, layers=[*layers], states=states.flip(0))
    for layer, logits in zip(layers, follows, strict=True):
        put = hooks.Patch(hooks.Site(layer), (3,), lambda _, layer=layer: states.flip(0)[layer][None])
        expected = given.logits([*prompt, *more], put)[len(prompt) - 1 :]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
