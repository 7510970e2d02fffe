"""Every engine does what the contract asks."""

from __future__ import annotations

import pytest
import tiny
from engine_check import check_engine

from patchscope_nn.engines import ENGINES, engine_of


@pytest.mark.quick
def test_a_model_is_run_by_the_engine_it_names(tiny_model):
    assert engine_of(tiny_model()) is ENGINES["transformers"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_engine_of_transformers_models(family, tiny_model, run_cells):
    model = tiny_model(family)
    assert set(ENGINES) == {"transformers", "vllm"}
    check_engine(model, tiny.reference(family), run_cells, tokenizer=tiny.TOKENIZER, eos=[tiny.EOS_ID])
