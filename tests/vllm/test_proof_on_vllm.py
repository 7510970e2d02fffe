"""The engine does what every engine does, and the proof finds what would make its results wrong."""

from __future__ import annotations

import nnsight
import planted
import pytest
import tiny
from engine_check import check_engine

import patchscope_nn as ps
from patchscope_nn.backends import Local
from patchscope_nn.body import requests as body
from patchscope_nn.errors import InputError, ModelError
from patchscope_nn.proof import requests as proof
from patchscope_nn.spec import SITES

#: How many tensors the blocks of vLLM's implementations return.
TERMS = {"llama": 2, "gpt2": 1, "qwen2": 2}


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.vllm_quick), "gpt2", "qwen2"])
def test_the_contract_and_the_proof(family, engine_for, tiny_folder, run_cells, monkeypatch):
    model = engine_for(tiny_folder(family), max_model_len=64)
    assert model.info.architecture.terms == TERMS[family] == model.info.verdict.terms
    assert model.info.verdict.withheld == ()
    assert any("plain hooks" in comparison.what for comparison in model.info.verdict.comparisons)
    reference = tiny.reference(family, d_model=256)
    # vLLM's kernels round otherwise; states of these models are as large as 100.
    options = {"tokenizer": tiny.TOKENIZER, "eos": [tiny.EOS_ID], "tolerance": 2e-3}
    check_engine(model, reference, run_cells, **options)
    _refuses_a_part_of_the_state(model, monkeypatch)
    _withholds_a_site(model, monkeypatch)


def _refuses_a_part_of_the_state(model, monkeypatch):
    """A read of the block's output, and not of the stream that it is added to."""
    if model.info.architecture.terms == 1:
        return
    with monkeypatch.context() as patch:
        patch.setattr(proof, "_TERMS", (1,))
        with pytest.raises(ModelError, match="do not return the residual stream"):
            proof.prove_requests(model, Local(), key="unused")


def _withholds_a_site(model, monkeypatch):
    nnsight.register("planted")
    for fault, why in ((planted.doubled, "written onto itself"), (planted.without_effect, "no effect")):
        proved = proof._Proof(model, Local())
        proved.terms = model.info.architecture.terms
        with monkeypatch.context() as patch:
            patch.setattr(body, "in_replaced", fault)
            proved.check_site(SITES["mlp"])
        (withheld,) = proved.withheld
        assert withheld.name == withheld.optimisation == "mlp"
        assert why in withheld.why


def test_what_a_proof_withheld_is_refused(engine, monkeypatch):
    from dataclasses import replace

    from patchscope_nn.models import Withheld

    verdict = replace(engine.info.verdict, withheld=(Withheld("mlp", None, 0, "a state differs"),))
    model = replace(engine, info=replace(engine.info, verdict=verdict))
    scope = ps.Patchscope(source=ps.Source(prompt="Diana", layer=3, site="mlp"), target=ps.Target(layer=-1))
    with pytest.raises(InputError, match=r"source\.site='mlp'.*wrong results.*a state differs"):
        ps.run(scope, model=model)
