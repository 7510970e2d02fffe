"""The proof of a model on a real server: one job carries it, and its verdict is kept."""

from __future__ import annotations

import launch

import patchscope_nn as ps
from patchscope_nn.backends import Ndif
from patchscope_nn.backends.ndif.client import NdifClient
from patchscope_nn.proof import proven_on, store


def test_the_first_job_carries_the_proof(ndif, monkeypatch, tmp_path):
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    sent = []
    submit = NdifClient.submit

    def counted(*args):
        sent.append(submit(*args))
        return sent[-1]

    monkeypatch.setattr(NdifClient, "submit", counted)
    model = ps.load(launch.TINY, weights=False)
    assert model.info.verdict is None
    verdict = proven_on(model, Ndif(ndif)).info.verdict
    assert verdict.withheld == ()
    kinds = ["next_token", "hidden", "generate", "choices"]
    assert [comparison.what for comparison in verdict.comparisons] == [
        f"all optimisations: {kind}" for kind in kinds
    ]
    assert all(comparison.error < 1e-3 for comparison in verdict.comparisons)
    assert len(sent) == 1
    assert proven_on(model, Ndif(ndif)).info.verdict == verdict
    assert len(sent) == 1


def test_a_run_says_what_its_proof_found(ndif, tmp_path):
    scope = ps.Patchscope(source=ps.Source(prompt="Paris", layer=0), target=ps.Target(prompt="x", layer=0))
    run = ps.run(scope, model=launch.TINY, remote=ndif, out=tmp_path / "run")
    assert run.manifest["models"]["target"]["proof"]["withheld"] == []
