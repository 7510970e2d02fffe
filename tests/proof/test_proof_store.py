"""Verdicts on disk: one proof for each structure, and another wherever something that decides it changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn._util import versions
from patchscope_nn.models import Comparison, Verdict, Withheld
from patchscope_nn.proof import loading, store
from patchscope_nn.spec import SITES, Site

VERDICT = Verdict(
    key="key",
    causal=False,
    limit=200,
    withheld=(Withheld("mixed_lengths", "generate", 12, "generate differs by 2 standard deviations"),),
    comparisons=(Comparison("plain path: next_token", 30, 11, 1e-6, 5e-4, "equal"),),
    elapsed_s=0.5,
)


pytestmark = pytest.mark.usefixtures("verdicts")


@pytest.fixture
def proofs(monkeypatch):
    """The keys of the models that were proven."""
    true, made = loading.prove, []

    def prove(model, *, key):
        made.append(key)
        return true(model, key=key)

    monkeypatch.setattr(loading, "prove", prove)
    return made


def load(*, module=None, **options):
    return ps.load(module or tiny.make_module("llama"), tokenizer=tiny.TOKENIZER, **options)


def forwards_of(module):
    """A list that grows with each whole forward of a model."""
    ran = []
    module.lm_head.register_forward_hook(lambda *_: ran.append(1))
    return ran


def test_a_second_load_reads_the_verdict_and_runs_no_forward(verdicts, proofs):
    first = load()
    module = tiny.make_module("llama", seed=1)  # weights do not decide it
    ran = forwards_of(module)
    second = load(module=module)
    assert not ran
    assert len(proofs) == len(list(verdicts.iterdir())) == 1
    assert second.info.verdict == first.info.verdict


def test_a_model_that_is_loaded_is_not_proven_twice(proofs):
    model = load()
    assert ps.load(model) is model
    source, target = ps.Source(prompt="Diana", layer=0), ps.Target(layer=1)
    ps.run(ps.Patchscope(source=source, target=target, readout=ps.NextToken()), model=model)
    assert len(proofs) == 1


def test_without_proof_no_forward_is_run(verdicts, proofs):
    module = tiny.make_module("llama")
    ran = forwards_of(module)
    model = load(module=module, proof=False)
    assert model.info.verdict is None
    assert not ran
    assert not proofs
    assert not verdicts.exists()


def changed(monkeypatch, what):
    """A model that is like others but for one thing."""
    if what == "dtype":
        return load(module=tiny.make_module("llama").to(torch.bfloat16), proof=False)
    module = tiny.make_module("llama")
    if what == "attention":
        module.set_attn_implementation("eager")
    if what == "config":
        module.config.rope_parameters["rope_theta"] = 5000.0
    if what == "version":
        true = versions._version
        monkeypatch.setattr(versions, "_version", lambda name: "9.9" if name == "torch" else true(name))
    if what == "code":
        monkeypatch.setattr(store, "_code_digest", lambda: "other")
    if what == "sites":
        monkeypatch.setitem(SITES, "gate", Site(name="gate", modules=("mlp.gate_proj",)))
    if what == "class":
        module.__class__ = type("OtherForCausalLM", (type(module),), {})
    return load(module=module, proof=False)


@pytest.mark.parametrize("what", ["dtype", "attention", "config", "version", "code", "class", "sites"])
def test_what_decides_a_verdict_is_in_its_key(what, monkeypatch):
    before = store.structure_key(load(proof=False))
    assert store.structure_key(load(proof=False)) == before
    assert store.structure_key(changed(monkeypatch, what)) != before


def test_names_are_not_in_the_key(tmp_path):
    tiny.make_module("llama").save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    before = store.structure_key(load(proof=False))
    assert store.structure_key(ps.load(tmp_path, proof=False)) == before


def test_another_dtype_is_proven_again(proofs):
    load()
    half = load(module=tiny.make_module("llama").to(torch.bfloat16))
    assert len(set(proofs)) == 2
    assert half.info.verdict.comparisons[0].tolerance > 0.1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', '{"key": 1, "withheld": [{}]}', "\xff"])
def test_a_broken_file_is_proven_again(text, verdicts, proofs):
    model = load()
    (file,) = verdicts.iterdir()
    file.write_bytes(text.encode("latin-1"))
    assert load().info.verdict.withheld == ()
    assert len(proofs) == 2
    assert json.loads(file.read_text())["key"] == model.info.verdict.key


def test_a_folder_that_cannot_be_written_costs_a_proof_each_time(monkeypatch, tmp_path, proofs):
    (tmp_path / "file").touch()
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "file" / "proofs")
    assert load().info.verdict.withheld == load().info.verdict.withheld == ()
    assert len(proofs) == 2


def test_a_verdict_comes_back_as_it_was_kept(verdicts):
    store.keep(VERDICT)
    assert store.known("key") == VERDICT
    assert store.known("other") is None
    assert [file.name for file in verdicts.iterdir()] == ["key.json"]


def test_processes_that_write_at_once_leave_a_whole_file(verdicts):
    code = (
        "import pathlib, sys\n"
        "from test_proof_store import VERDICT, store\n"
        "store.folder = lambda: pathlib.Path(sys.argv[1])\n"
        "for _ in range(300):\n"
        "    store.keep(VERDICT)\n"
    )
    command = [sys.executable, "-c", code, str(verdicts)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    writers = [
        subprocess.Popen(command, cwd=Path(__file__).parent, env=env, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        time.sleep(0.001)  # they need the processor, to import what they import
        if verdicts.exists() and (verdicts / "key.json").exists():
            assert store.known("key") == VERDICT
            seen += 1
    assert all(writer.returncode == 0 for writer in writers), [w.stderr.read() for w in writers]
    for writer in writers:
        writer.stderr.close()
    assert seen
    assert [file.name for file in verdicts.iterdir()] == ["key.json"]


def test_tests_keep_their_verdicts_to_themselves(cache, monkeypatch):
    monkeypatch.undo()
    assert store.folder().is_relative_to(cache)
