"""Every readout in depth, against plain hooks: places, references, ends of text, kinds of prompt."""

from __future__ import annotations

import math
from collections import Counter

import hooks
import pytest
import tiny
import torch

from patchscope_nn.body.readouts import top_logits
from patchscope_nn.models import load
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Patchscope, Source, Target

ROWS = (
    {"s": "The Eiffel Tower is in", "t": "Diana is in Paris x ->", "a": " Paris", "b": " the city of"},
    {"s": "Diana", "t": "x is", "a": " Diana of Paris", "b": " in"},
    {"s": "x", "t": "x", "a": " E", "b": "el x"},
)
SOURCE = Source(prompt="{s}", layer=["embed", 1, -1])
TARGET = Target(prompt="{t}", position="x", layer=["embed", 1])
CHAT = [{"role": "user", "content": "The Tower"}]


def check(scope, found, *, family="llama", rows=ROWS, tokenizer=tiny.TOKENIZER):
    pair = hooks.Pair(scope, tiny.reference(family), tokenizer=tokenizer, eos=[tiny.EOS_ID])
    assert found
    for cell, given in found:
        hooks.assert_same(given, pair.expected(cell, rows[cell.row]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("position", [0, -1, -2])
def test_next_token_after_any_position(family, position, tiny_model, run_cells):
    """Rows of different length: an index from the left names another column in each."""
    rows = [{"s": row["s"], "t": "x " + row["t"]} for row in ROWS]
    scope = Patchscope(
        source=SOURCE,
        target=Target(prompt="{t}", position=0, layer=["embed", 1]),
        readout=NextToken(position=position, reference="source"),
    )
    found = run_cells(scope, tiny_model(family), rows=rows, controls=["unpatched"])
    check(scope, found, family=family, rows=rows)


@pytest.mark.parametrize("context", ["session", "fused"])
@pytest.mark.parametrize("position", [{"each": "all"}, {"start": 0}, {"each": [0, -1]}])
def test_the_source_is_the_reference_at_each_position(position, context, tiny_model, run_cells):
    """The distribution that is compared is the one after the token that is read, not after the last one."""
    rows = ROWS[:2]
    scope = Patchscope(
        source=Source(prompt="{s}", position=position, layer=1),
        target=Target(position=None, layer=2),
        readout=NextToken(reference="source", top_k=2),
    )
    found = run_cells(scope, tiny_model(), rows=rows, controls=["unpatched"], context=context)
    check(scope, found, rows=rows)


def test_all_of_the_vocabulary(tiny_model, run_cells):
    scope = Patchscope(source=SOURCE, target=TARGET, readout=NextToken(top_k=1000))
    found = run_cells(scope, tiny_model(), rows=ROWS)
    check(scope, found)
    for _, given in found:
        assert len(given["top_ids"]) == tiny.VOCAB_SIZE
        assert math.isclose(sum(given["top_probs"]), 1, abs_tol=1e-5)
        assert 0 < given["entropy_nats"] < math.log(tiny.VOCAB_SIZE)


def test_the_two_surprisals_are_two(tiny_model, run_cells):
    """-log p_source(top of the patched run), and -log p_patched(top of the source)."""
    scope = Patchscope(source=SOURCE, target=TARGET, readout=NextToken(reference="source"))
    found = run_cells(scope, tiny_model(), rows=ROWS)
    reference = tiny.reference("llama")
    for cell, given in found:
        ids = tiny.TOKENIZER(ROWS[cell.row]["s"])["input_ids"]
        source = torch.log_softmax(reference.logits(ids)[-1], -1)
        assert math.isclose(given["surprisal_nats"], -source[given["top_ids"][0]].item(), abs_tol=1e-4)
        assert given["reference_ids"] == [source.argmax().item()]
        assert given["nll_nats"] == -given["reference_logprobs"][0]
    assert any(abs(given["surprisal_nats"] - given["nll_nats"]) > 0.1 for _, given in found)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "opt"])
def test_choices_of_unequal_length(family, tiny_model, run_cells):
    """One row's first choice is longer than another's, so that the choices are padded too."""
    scope = Patchscope(source=SOURCE, target=TARGET, readout=Choices(["{a}", "{b}", " the city of Paris"]))
    found = run_cells(scope, tiny_model(family), rows=ROWS, controls=["unpatched"])
    check(scope, found, family=family)
    for _, given in found:
        assert math.isclose(sum(given["choice_probs"]), 1, abs_tol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "opt"])
def test_generation_beyond_the_window(family, tiny_model, run_cells):
    scope = Patchscope(source=SOURCE, target=TARGET, readout=Generate(max_new_tokens=12))
    check(scope, run_cells(scope, tiny_model(family), rows=ROWS[:2]), family=family, rows=ROWS[:2])


def test_one_new_token(tiny_model, run_cells):
    scope = Patchscope(source=SOURCE, target=TARGET, readout=Generate(max_new_tokens=1))
    check(scope, run_cells(scope, tiny_model(), rows=ROWS))


def test_an_end_that_comes_first_leaves_no_text(tiny_model, run_cells, monkeypatch):
    model = tiny_model()
    scope = Patchscope(source=SOURCE, target=TARGET, readout=Generate(max_new_tokens=3))
    ids = [given["token_ids"][0] for _, given in run_cells(scope, model, rows=ROWS)]
    monkeypatch.setattr(model.module.generation_config, "eos_token_id", sorted(set(ids)))
    for _, given in run_cells(scope, model, rows=ROWS):
        assert given == {"token_ids": [], "stopped": "eos"}


def test_an_end_is_the_configs_or_the_tokenizers(run_cells):
    model = load(tiny.make_module("llama"), tokenizer=tiny.make_tokenizer())
    config = model.module.generation_config
    scope = Patchscope(source=Source(prompt="Diana", layer=1), target=Target(layer=1), readout=Generate())
    ((_, given),) = run_cells(scope, model)
    said, end = given["token_ids"], given["token_ids"][4]
    expected = {"token_ids": said[: said.index(end)], "stopped": "eos"}
    config.eos_token_id = end
    assert run_cells(scope, model)[0][1] == expected
    config.eos_token_id = None
    assert run_cells(scope, model)[0][1] == given
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(end)
    assert run_cells(scope, model)[0][1] == expected


def test_a_stop_spread_over_tokens_ends_no_row(tiny_model, run_cells):
    """Only whole tokens are looked at in the context; the text is cut on the client."""
    scope = Patchscope(source=Source(prompt="Diana", layer=1), target=Target(layer=1), readout=Generate())
    ((_, given),) = run_cells(scope, tiny_model())
    stop = tiny.TOKENIZER.decode(given["token_ids"][:2])
    scope = scope.model_copy(update={"readout": Generate(stop=stop)})
    assert run_cells(scope, tiny_model())[0][1] == given


def test_each_row_stops_for_itself(tiny_model, run_cells):
    """What a row says does not depend on whether its neighbours have ended."""
    scope = Patchscope(source=SOURCE, target=TARGET, readout=Generate(max_new_tokens=10, stop="a"))
    found = run_cells(scope, tiny_model(), rows=ROWS, controls=["unpatched"])
    check(scope, found)
    assert len({len(given["token_ids"]) for _, given in found}) > 2


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
def test_hidden_is_what_stands_at_the_site(site, family, tiny_model, run_cells):
    scope = Patchscope(
        source=Source(prompt="{s}", position=-1, layer=[0, -1], site=site),
        target=Target(prompt="{t}", position="x", layer=[0, -1], site=site),
        readout=Hidden(),
    )
    found = run_cells(scope, tiny_model(family), rows=ROWS, controls=["unpatched"])
    check(scope, found, family=family)
    for cell, given in found:
        assert (given["hidden"] is None) == (cell.control == "unpatched")


@pytest.mark.parametrize("readout", [NextToken(reference="source"), Generate(max_new_tokens=4)])
def test_a_leading_special_token(readout, tiny_model, run_cells):
    scope = Patchscope(source=SOURCE, target=TARGET, readout=readout)
    found = run_cells(scope, tiny_model(bos=True), rows=ROWS, controls=["unpatched"])
    check(scope, found, tokenizer=tiny.TOKENIZER_BOS)
    assert all(cell.target_positions[0] > 0 for cell, _ in found)


@pytest.mark.parametrize(
    "readout", [NextToken(reference="source"), Generate(max_new_tokens=4), Choices([" in", " is in"])]
)
def test_chats_and_token_ids(readout, tiny_model, run_cells):
    text = tiny.TOKENIZER.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    chat = tiny.TOKENIZER(text, add_special_tokens=False)["input_ids"]
    ids = tiny.TOKENIZER(ROWS[0]["t"])["input_ids"]
    for source, target in ((CHAT, ids), (ids, CHAT)):
        scope = Patchscope(
            source=Source(prompt=source, position=-1, layer=[0, 2]),
            target=Target(prompt=target, position=-2, layer=[1, 2]),
            readout=readout,
        )
        found = run_cells(scope, tiny_model(), controls=["unpatched"])
        plain = Patchscope(
            source=Source(prompt=chat if source is CHAT else ids),
            target=Target(prompt=chat if target is CHAT else ids),
            readout=readout,
        )
        check(plain, found, rows=({},))


def test_samples_follow_the_distribution(tiny_model, run_cells):
    """The first token of 600 samples, against the probabilities it is drawn from at this temperature."""
    temperature = 0.7
    scope = Patchscope(
        source=Source(prompt="{s}", position={"each": "all"}, layer="all"),
        target=Target(prompt="The Tower x", position=0, layer=0),
        mapping=lambda states: states * 0,
        readout=Generate(max_new_tokens=1, temperature=temperature),
    )
    rows = [{"s": f"{letter}The city of Paris is in the city{letter}"} for letter in "abcdefghijklmnopq"]
    found = run_cells(scope, tiny_model(), rows=rows, max_rows=600)
    patch = hooks.Patch(hooks.Site(0), (0,), lambda clean: clean * 0)
    ids = tiny.TOKENIZER("The Tower x")["input_ids"]
    probs = torch.softmax(tiny.reference("llama").logits(ids, patch)[-1] / temperature, -1)
    drawn = Counter(tuple(given["token_ids"]) for _, given in found)
    count = len(found)
    assert count >= 600
    for token, p in enumerate(probs.tolist()):
        if p > 0.02:
            share = drawn[() if token == tiny.EOS_ID else (token,)] / count
            assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)
    assert probs.max() < 0.9


def test_samples_depend_on_the_seed_alone(tiny_model, run_cells):
    def say(**options):
        scope = Patchscope(source=SOURCE, target=TARGET, readout=Generate(max_new_tokens=8, **options))
        return [given for _, given in run_cells(scope, tiny_model(), rows=ROWS)]

    assert say(temperature=1.0, seed=1) == say(temperature=1.0, seed=1)
    assert say(temperature=1.0, seed=1) != say(temperature=1.0, seed=2)
    assert say(temperature=1.0, seed=1) != say()
    assert say(temperature=1e-4, seed=1) == say()


@pytest.mark.parametrize("vocab", [300, 512, 1000])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_top_logits_are_those_of_topk(vocab, count):
    """With -inf, and a vocabulary that is not whole blocks; of equal logits, the first comes first."""
    torch.manual_seed(vocab)
    scores = torch.randn(7, vocab)
    scores[0, :-3] = -torch.inf
    scores[1, -1] = 9.0
    values, ids = top_logits(scores, count)
    expected = scores.topk(count, dim=-1)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)
    tied = torch.zeros(2, vocab)
    assert top_logits(tied, 1)[1].tolist() == [[0], [0]]
