"""What the quality benchmark reads, counts and writes; what real models say is in its results."""

import csv

import numpy as np
import pytest
import tiny

from benchmarks.quality import contexts as held_out
from benchmarks.quality import cross_model, entities, next_token
from benchmarks.quality.intervals import interval, intervals
from benchmarks.quality.models import short
from benchmarks.quality.write import draw_curves, markdown
from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.models import load
from patchscope_nn.runs.results import load_run

PARAGRAPH = (
    ' He had a guest @-@ starring role ( 1 @,@ 200 lines ) in " The Bill " , in 2000 . A <unk> followed . '
    "It was the first city in the north that had , of all , a tower . \n"
)


PLAIN = PARAGRAPH.replace("(", "").replace('"', "")
PASSAGES = "".join(f" {word} {PLAIN}" for word in "abcdefghij")


@pytest.fixture
def wikitext(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "WORDS", 9)
    monkeypatch.setattr(held_out, "MOST", 20)
    file = tmp_path / "wiki" / "test.txt"
    file.parent.mkdir()
    file.write_text(f" \n = Robert <unk> = \n \n{PARAGRAPH}", encoding="utf-8")
    return file


def test_passages_are_ordinary_text_without_rare_words(wikitext):
    assert held_out.passages(wikitext) == [
        'He had a guest-starring role (1,200 lines) in "The Bill", in 2000.',
        "It was the first city in the north that had, of all, a tower.",
    ]


def test_a_context_is_a_beginning_that_ends_after_a_token(wikitext, tiny_model):
    model = tiny_model("llama")
    wikitext.write_text(PLAIN * 20, encoding="utf-8")
    rows = held_out.contexts(wikitext, model=model, count=12)
    assert rows == held_out.contexts(wikitext, model=model, count=12)
    sizes = [len(model.tokenizer(row["context"])["input_ids"]) for row in rows]
    assert len(set(sizes)) > 4
    assert min(sizes) >= held_out.LEAST
    assert max(sizes) <= 20
    texts = held_out.passages(wikitext)
    assert all(any(text.startswith(row["context"]) for text in texts) for row in rows)


def test_too_few_passages_are_an_error(wikitext, tiny_model):
    with pytest.raises(ValueError, match="passages"):
        held_out.contexts(wikitext, model=tiny_model("llama"), count=50)


def test_an_interval_holds_the_mean_and_narrows_with_rows():
    values = np.random.default_rng(1).normal(2.0, 1.0, size=400)
    few, many = interval(values[:25]), interval(values)
    assert many.low < values.mean() < many.high
    assert many.mean == pytest.approx(values.mean())
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert few.high - few.low > 2 * (many.high - many.low)


def test_columns_are_resampled_together():
    first = np.random.default_rng(2).random(30)
    spans = intervals(np.stack([first, 1 - first], axis=1))
    assert spans[0].low == pytest.approx(1 - spans[1].high)


def test_the_judged_layers_are_the_same_share_of_any_depth():
    assert next_token.middle(24) == range(14, 23)
    assert next_token.middle(48) == range(28, 47)


def test_the_next_token_page_says_what_the_csv_holds(wikitext, tmp_path, tiny_model):
    wikitext.write_text(PLAIN * 20, encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    next_token.run(
        tiny_model("llama"), texts=wikitext, count=6, work=tmp_path / "work", out=out, command="a command"
    )
    with (out / "next-token.csv").open() as stream:
        found = list(csv.DictReader(stream))
    assert {(row["method"], row["control"]) for row in found} == {
        (method, control) for method in next_token.METHODS for control in ("", *next_token.CONTROLS)
    }
    assert {row["n"] for row in found} == {"6"}
    last = [
        row["mean"]
        for row in found
        if (row["layer"], row["metric"], row["control"]) == ("3", "precision_at_1", "")
    ]
    assert last == ["1.0000", "1.0000"]
    page = (out / "next-token.md").read_text()
    assert "Written by `a command`." in page
    assert "6 contexts of wiki/test.txt" in page
    assert "Last layer: token identity 1.000, logit lens 1.000." in page
    assert str(tmp_path) not in page
    assert "<svg" in (out / "next-token.svg").read_text()


def test_the_cross_model_page_has_every_pair_of_the_maps_and_their_controls(wikitext, tmp_path, tiny_model):
    wikitext.write_text(PLAIN * 20, encoding="utf-8")
    other = wikitext.with_name("valid.txt")
    other.write_text(PASSAGES, encoding="utf-8")
    cross_model.run(
        tiny_model("llama"),
        tiny_model("llama", copy=1),
        fit_on=other,
        texts=wikitext,
        layers=[1, 2],
        target_layers=[0, 3],
        fitted=12,
        count=6,
        work=tmp_path / "work",
        out=tmp_path,
        command="a command",
    )
    with (tmp_path / "cross-model.csv").open() as stream:
        found = list(csv.DictReader(stream))
    assert [(row["method"], row["layer"], row["target_layer"]) for row in found] == [
        (method, layer, other)
        for method in ("affine", "shuffled", "random", "mean state")
        for layer in "12"
        for other in "03"
    ]
    page = (tmp_path / "cross-model.md").read_text()
    assert "6 contexts of wiki/test.txt" in page
    assert "12 passages of wiki/valid.txt" in page
    assert str(tmp_path) not in page
    (folder,) = (tmp_path / "work").glob("cross-mean-*")
    table = load_run(folder).table()
    said = {
        (layer, other): {tokens[0] for tokens in part["top_tokens"]}
        for (layer, other), part in table.groupby(["source_layer", "target_layer"])
    }
    assert [len(tokens) for tokens in said.values()] == [1] * 4, "the mean knows nothing of the context"


def long_model(seed):
    """A tiny model that reads the description prompt, which is long in so small a vocabulary."""
    module = tiny.make_module("llama", seed=seed)
    module.config.max_position_embeddings = 512
    return load(module, tokenizer=tiny.TOKENIZER)


def test_the_page_of_descriptions_across_models_has_every_layer_and_its_control(wikitext, tmp_path):
    wikitext.write_text(PASSAGES, encoding="utf-8")
    entities.run_across(
        long_model(0),
        long_model(1),
        fit_on=wikitext,
        layers=[1, 2],
        target_layers=[0, 3],
        fitted=12,
        count=3,
        work=tmp_path / "work",
        out=tmp_path,
        command="a command",
    )
    with (tmp_path / "cross-model-entities.csv").open() as stream:
        found = [row for row in csv.DictReader(stream) if row["metric"] == "resolved"]
    assert [(row["target"], row["control"], row["layer"]) for row in found] == [
        (f"l* = {at}", control, layer) for at in (0, 3) for control in ("", "shuffled") for layer in "12"
    ]
    page = (tmp_path / "cross-model-entities.md").read_text()
    assert "12 passages of wiki/test.txt" in page
    assert str(tmp_path) not in page
    tables = [load_run(folder).table() for folder in (tmp_path / "work").iterdir()]
    assert {tuple(table["mapping"].unique()) for table in tables} == {("fitted",)}
    assert len({tuple(table["text"]) for table in tables}) == 2


def test_key_words_are_those_of_entities_that_ship():
    shipped = {row["entity"] for row in load_rows(DataSpec(builtin="entities"))}
    assert set(entities.KEYS) <= shipped
    for entity, keys in entities.KEYS.items():
        assert keys == keys.lower(), entity


@pytest.mark.parametrize(
    ("text", "entity", "resolved"),
    [
        (": American boxer, x", "Muhammad Ali", True),
        (": Pandora's box", "Muhammad Ali", True),
        (": American toolbox maker", "Muhammad Ali", False),
        (": Ancient Greek philosopher", "Alexander the Great", True),
        (": United Kingdom, United States: Country", "Alexander the Great", False),
        (": Arab country, Mike Tyson: American boxer", "Muhammad Ali", False),
        ("", "Albert Einstein", False),
    ],
)
def test_a_text_resolves_its_entity_by_a_word_that_begins_so(text, entity, resolved):
    assert entities.resolves(text, entity) is resolved


@pytest.mark.parametrize(
    ("text", "description"),
    [
        (": American boxer, Barack Obama: American politician", "American boxer"),
        (
            ": English playwright, actor, and poet, United States: Country",
            "English playwright, actor, and poet",
        ),
        (": City in the U.S. state of New York. Paris: x", "City in the U.S"),
        ("iaomi, Google: American", "iaomi"),
        ("Albert Einstein: German physicist", ""),
        (" a\nb", "a"),
    ],
)
def test_a_description_ends_where_another_item_begins(text, description):
    assert entities.description(text) == description


def test_a_table_keeps_its_cells():
    assert (
        markdown(["a", "b"], [["x|y", "two\nlines"]]) == "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n"
    )


def test_the_same_curves_are_the_same_file(tmp_path):
    spans = intervals(np.eye(4))
    for name in ("one.svg", "two.svg"):
        draw_curves(
            tmp_path / name, {"a": (range(4), spans), "a, random": (range(4), spans)}, title="t", y="y"
        )
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_model_has_a_short_name():
    assert short("Qwen/Qwen2.5-Coder-0.5B-Instruct") == "qwen2.5-coder-0.5b-instruct"
    assert short("builtin:smollm2-135m-instruct") == "smollm2-135m-instruct"
