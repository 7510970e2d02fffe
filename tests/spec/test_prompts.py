"""Where a prompt ends, with a tokenizer that puts its end token after every text."""

from __future__ import annotations

import itertools
import logging

import hooks
import pytest
import tiny

import patchscope_nn as ps
from patchscope_nn.models import load
from patchscope_nn.plan import plan
from patchscope_nn.spec import encoding
from patchscope_nn.spec.encoding import continuation_ids, encode

TEXT = "The Eiffel Tower"
OWN = tiny.TOKENIZER(TEXT)["input_ids"]


class Slow:
    """The interface of a tokenizer that is written in Python: no spans."""

    is_fast = False

    def __init__(self, fast):
        self._fast = fast

    def __call__(self, text, *, add_special_tokens=True):
        return self._fast(text, add_special_tokens=add_special_tokens)

    def __len__(self):
        return len(self._fast)

    def decode(self, ids):
        return self._fast.decode(ids)


KINDS = [
    pytest.param(bos, wrap, id=f"{name}, {'bos and eos' if bos else 'eos'}")
    for bos, (name, wrap) in itertools.product([True, False], [("fast", lambda one: one), ("slow", Slow)])
]


@pytest.mark.parametrize(("bos", "wrap"), KINDS)
def test_a_prompt_ends_where_its_text_ends(bos, wrap):
    tokenizer = wrap(tiny.make_tokenizer(bos=bos, eos=True))
    assert tokenizer(TEXT)["input_ids"][-1] == tiny.EOS_ID
    encoded = encode(TEXT, tokenizer, field="source.prompt")
    start = [0] * bos
    assert list(encoded.ids) == start + OWN
    assert encoded.tokens[-1] == " Tower"
    assert len(encoded.spans) == len(encoded.tokens) == len(encoded.ids)
    assert encoded.text.endswith(TEXT)
    assert encoded.dropped == (tiny.EOS,)
    said = continuation_ids(encoded, " is", tokenizer, field="readout.choices")
    assert list(said) == tiny.TOKENIZER(" is")["input_ids"]


@pytest.mark.parametrize(("bos", "wrap"), KINDS)
@pytest.mark.parametrize("n_ends", [1, 2])
@pytest.mark.parametrize("text", [TEXT, ""])
def test_a_text_that_ends_in_the_token_keeps_it(bos, wrap, text, n_ends):
    tokenizer = wrap(tiny.make_tokenizer(bos=bos, eos=True))
    encoded = encode(text + tiny.EOS * n_ends, tokenizer, field="source.prompt")
    own = tiny.TOKENIZER(text)["input_ids"] if text else []
    assert list(encoded.ids) == [0] * bos + own + [tiny.EOS_ID] * n_ends


def test_ids_and_chats_are_as_they_are():
    tokenizer = tiny.make_tokenizer(eos=True)
    ids = encode((*OWN, tiny.EOS_ID), tokenizer, field="source.prompt")
    assert ids.ids == (*OWN, tiny.EOS_ID)
    chat = (("user", TEXT),)
    assert encode(chat, tokenizer, field="T").ids == encode(chat, tiny.TOKENIZER, field="T").ids
    assert ids.dropped == encode(chat, tokenizer, field="T").dropped == ()


def test_a_run_reads_the_text_s_last_token_and_says_so_once(caplog, tmp_path):
    encoding._log_once.cache_clear()
    model = load(tiny.make_module("llama"), tokenizer=tiny.make_tokenizer(eos=True))
    scope = ps.Patchscope(
        source=ps.Source(prompt=TEXT, layer=1),
        target=ps.Target(prompt="Diana is x", position=-1, layer=2),
        readout=ps.NextToken(top_k=3),
    )
    with caplog.at_level(logging.WARNING, logger="patchscope_nn"):
        run = ps.run(scope, model=model, out=tmp_path / "run")
        ps.run(scope, model=model)
    (cell,) = run.table().to_dict("records")
    assert (cell["source_token"], cell["target_token"]) == ([" Tower"], ["x"])
    reference = tiny.reference("llama")
    state = reference.state(OWN, hooks.Site(1), (len(OWN) - 1,))
    written = tiny.TOKENIZER("Diana is x")["input_ids"]
    patch = hooks.Patch(hooks.Site(2), (len(written) - 1,), lambda _clean: state)
    expected = hooks.next_token(reference.logits(written, patch)[-1], top_k=3)
    assert cell["top_ids"] == expected["top_ids"]
    assert cell["top_probs"] == pytest.approx(expected["top_probs"], abs=1e-5)
    (notice,) = run.manifest["notices"]
    assert "adds '<eos>' after every text" in notice
    assert [record.message for record in caplog.records] == [notice]


def test_the_plan_says_so(tiny_model):
    from patchscope_nn.sweep import expand

    def text_of(model):
        scope = ps.Patchscope(source=ps.Source(prompt=TEXT, layer=1), readout=ps.NextToken())
        return " ".join(str(plan(expand(scope, rows=[{}], source=model, target=model))).split())

    ending = load(tiny.make_module("llama"), tokenizer=tiny.make_tokenizer(eos=True))
    assert "note: the tokenizer adds '<eos>' after every text" in text_of(ending)
    assert "after every text" not in text_of(tiny_model())
