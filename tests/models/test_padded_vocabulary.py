"""A model with more token ids than its tokenizer: `<id 105>` stands wherever such a token is shown."""

from __future__ import annotations

import html

import pytest
import tiny
import torch
from commands import caller

import patchscope_nn as ps
from patchscope_nn.explore.answers import Answers
from patchscope_nn.explore.copies import Options
from patchscope_nn.explore.lenses import lenses
from patchscope_nn.explore.views import CellView, GridView
from patchscope_nn.explore.worker import Query
from patchscope_nn.spec.encoding import decode

FIRST, SECOND = tiny.VOCAB_SIZE + 1, tiny.VOCAB_SIZE + 2
SHOWN = {f"<id {FIRST}>", f"<id {SECOND}>"}


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The folder of a model that always says one of two tokens beyond its tokenizer."""
    place = tmp_path_factory.mktemp("padded")
    module = tiny.make_module("llama", vocab_size=tiny.VOCAB_SIZE + 8)
    module.config.max_position_embeddings = 512
    with torch.no_grad():
        direction = module.lm_head.weight[0].clone()
        module.lm_head.weight.zero_()
        module.lm_head.weight[FIRST], module.lm_head.weight[SECOND] = direction, -direction
    module.save_pretrained(place)
    tiny.TOKENIZER.save_pretrained(place)
    return str(place)


def test_what_a_tokenizer_does_not_know_is_shown_by_its_number():
    known = tiny.TOKENIZER("The city")["input_ids"]
    assert decode(known, tiny.TOKENIZER) == "The city"
    assert decode([*known, FIRST, SECOND, *known], tiny.TOKENIZER) == (
        f"The city<id {FIRST}><id {SECOND}>The city"
    )
    assert decode([], tiny.TOKENIZER) == ""


def scope(readout):
    source = ps.Source(prompt="The Eiffel Tower", layer=[1, 2])
    return ps.Patchscope(source=source, target=ps.Target(prompt="The city"), readout=readout)


def test_a_run_its_summary_and_its_report_show_it(padded, tmp_path):
    run = ps.run(scope(ps.NextToken(top_k=1, reference="source")), model=padded, out=tmp_path / "run")
    table = run.table()
    assert {token for tokens in table["top_tokens"] for token in tokens} <= SHOWN
    assert {token for tokens in table["reference_tokens"] for token in tokens} <= SHOWN
    assert {html.unescape(text) for row in run.heatmap().data[0].text for text in row} <= SHOWN
    page = html.unescape(run.report().read_text(encoding="utf-8").replace("\\u0026", "&"))
    assert any(token in page for token in SHOWN)


def test_a_generated_text_shows_it(padded):
    run = ps.run(scope(ps.Generate(max_new_tokens=2)), model=padded)
    assert all(text.count("<id ") == 2 for text in run.table()["text"])


def test_the_quick_look_shows_it(padded, monkeypatch, capsys):
    done = caller(monkeypatch, capsys)("explain", "The city", "--model", padded, "--max-new-tokens", "2")
    assert done.returncode == 0
    assert done.stdout.count("<id 10") >= 2 * (1 + tiny.N_LAYERS)


def test_the_explorer_shows_it(padded):
    answers, events = Answers(lenses(), Options()), []
    names = {"prompt": "The city", "source_model": padded, "target_model": padded}
    answers.grid(GridView(**names), Query(lambda _: None, events.append))
    cell = CellView(**names, position=1, layer=1, max_new_tokens=2)
    answers.cell(cell, Query(lambda _: None, events.append))
    (grid,) = (event for event in events if event["event"] == "grid")
    assert {token for entry in grid["cells"] for token in entry["top_tokens"][:1]} <= SHOWN
    told = [event["text"] for event in events if event["event"] in ("text", "answer")]
    assert told
    assert all("<id 10" in text for text in told)
