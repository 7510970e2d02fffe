"""Checkpoints of models that also read images: each loads as its language model, and nothing is printed."""

from __future__ import annotations

import logging

import hooks
import pytest
import registry
import registry_sizes
import tiny
import torch
import transformers
from plain import Plain

import patchscope_nn as ps
from patchscope_nn.errors import ModelError
from patchscope_nn.spec import ATTENTION, MLP

#: Model types, and the class that a real checkpoint is saved as, where `registry.build` makes another.
CHECKPOINTS = {
    **dict.fromkeys(("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm")),
    **dict.fromkeys(("paligemma", "gemma3_text")),
    "llama4": "Llama4ForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}
ROWS = ({"s": "The Eiffel Tower is in", "t": "Diana is in x ->"}, {"s": "Paris", "t": "The Tower of x in"})
SCOPE = ps.Patchscope(
    source=ps.Source(prompt="{s}", layer=[0, 2]),
    target=ps.Target(prompt="{t}", position="x", layer=[1, -1]),
    readout=ps.NextToken(top_k=3),
)


def build(name):
    if CHECKPOINTS[name] is None:
        return registry.build(name)
    config = registry_sizes.config_of(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(transformers, CHECKPOINTS[name])._from_config(config, dtype=torch.float32)
    tiny._spread(module, 0)
    return module.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(name): a folder as transformers saves it, with a tokenizer alone and no processor."""
    made = {}

    def save(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(made[name])
            tiny.TOKENIZER.save_pretrained(made[name])
        return made[name]

    return save


@pytest.fixture
def said(capfd):
    """said(): whatever was printed or logged since the last call, by transformers too."""
    records = []

    class Keeping(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    handlers = [(logging.getLogger(name), Keeping()) for name in ("transformers", "nnsight")]
    for logger, handler in handlers:
        logger.addHandler(handler)

    def said():
        out = capfd.readouterr()
        found = [*records, out.out, out.err]
        records.clear()
        told = ("would change a number", "falling back to its reference")  # which users should know
        return [line for line in found if line.strip() and not any(text in line for text in told)]

    yield said
    for logger, handler in handlers:
        logger.removeHandler(handler)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_runs_and_equals_plain_hooks(name, checkpoint, said):
    folder = checkpoint(name)
    said()
    model = ps.load(folder)
    assert said() == []
    architecture, module = model.info.architecture, build(name)
    found = Plain(module, n_layers=registry_sizes.N_LAYERS)
    blocks = next(path for path, part in found.module.named_modules() if part is found.blocks)
    attention, mlp = (part and part.path for part in map(architecture.part, (ATTENTION, MLP)))
    plain = hooks.Reference(module, blocks=blocks, attention=attention, mlp=mlp)
    pair = hooks.Pair(SCOPE, plain, tokenizer=tiny.TOKENIZER)
    rows = ps.run(SCOPE, model=model, data=list(ROWS)).rows
    assert len(rows) == 8
    for row in rows:
        cell = Cell(row)
        expected = pair.expected(cell, ROWS[row["row"]])
        hooks.assert_same({key: row[key] for key in expected}, expected)


class Cell:
    """A table's row, as the reference takes it."""

    def __init__(self, row):
        self.source_layer, self.target_layer = row["source_layer"], row["target_layer"]
        self.source_positions = tuple(row["source_position"])
        self.target_positions = tuple(row["target_position"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_its_structure_is_read_without_its_weights(name, checkpoint, said):
    folder = checkpoint(name)
    loaded = ps.load(folder, proof=False)
    said()
    model = ps.load(folder, weights=False)
    assert said() == []
    assert model.info.device == "remote"
    assert model.info.architecture.blocks == loaded.info.architecture.blocks
    assert model.info.n_layers == loaded.info.n_layers


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_a_module_that_is_given_prints_nothing_either(name, said):
    module = build(name)
    said()
    model = ps.load(module, tokenizer=tiny.TOKENIZER)
    ps.run(SCOPE, model=model, data=list(ROWS))
    assert said() == []


def test_a_checkpoint_without_its_head_is_refused(tmp_path, said):
    """transformers would make the unembedding up at random, and only warn."""
    tiny.make_module("llama").model.save_pretrained(tmp_path)
    tiny.TOKENIZER.save_pretrained(tmp_path)
    said()
    with pytest.raises(ModelError, match=r"lacks weights of a LlamaForCausalLM.* random: lm_head\.weight\."):
        ps.load(tmp_path)
    assert said() == []


def test_tied_weights_are_not_missing(tmp_path):
    tiny.make_module("llama_tied").save_pretrained(tmp_path)
    tiny.TOKENIZER.save_pretrained(tmp_path)
    assert ps.load(tmp_path, proof=False).info.tied
