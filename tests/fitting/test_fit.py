"""Fits: what is asked, what texts they see, where they are kept, and what they refuse."""

from __future__ import annotations

import json

import fits
import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn.data.rows import DataSpec
from patchscope_nn.errors import DataError, InputError, LayerError, SpecError
from patchscope_nn.fitting import fit_mapping, parse_pairs
from patchscope_nn.fitting.closed.align import aligned
from patchscope_nn.fitting.closed.fit import _chunks
from patchscope_nn.fitting.texts import digest_of, read_texts
from patchscope_nn.mappings import Fitted
from patchscope_nn.runs.execute import fit_first
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.spec import Fit, Patchscope, Source, Target
from patchscope_nn.spec.encoding import Encoded, encode

WORDS = ("The", " Eiffel", " Tower", " is", " in", " the", " city", " of", " Paris", " Diana", "->")


def texts_of(count):
    chosen = torch.randint(len(WORDS), (count, 9), generator=torch.Generator().manual_seed(0))
    return ["".join(WORDS[word] for word in row) for row in chosen.tolist()]


def rows_of(count):
    return {"rows": [{"text": text} for text in texts_of(count)]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Texts.


def test_no_text_stands_in_two_parts():
    texts = [*texts_of(40), *texts_of(40), *(f"{text}  " for text in texts_of(40))]
    found = read_texts(DataSpec(rows=tuple({"text": text} for text in texts)), held_out=0.25)
    parts = [[text.strip() for text in part] for part in (found.fitted, found.choosing, found.held_out)]
    assert sorted(text for part in parts for text in part) == sorted(map(str.strip, texts_of(40)))
    assert [len(part) for part in parts] == [27, 3, 10]
    assert found.about["fitted_on"]["n_texts"] == 30
    assert found.about["held_out"]["n_texts"] == 10


def test_the_order_of_the_data_makes_no_difference_and_the_seed_does():
    rows = tuple({"text": text} for text in texts_of(40))
    one, turned = (read_texts(DataSpec(rows=given)) for given in (rows, rows[::-1]))
    assert set(one.held_out) == set(turned.held_out)
    assert one.about["held_out"]["digest"] == turned.about["held_out"]["digest"]
    assert set(read_texts(DataSpec(rows=rows), seed=1).held_out) != set(one.held_out)
    assert digest_of(["a", "b"]) == digest_of(["b", "a"]) != digest_of(["a"])


def test_held_out_data_of_its_own_loses_what_is_fitted_on():
    apart = DataSpec(rows=tuple({"text": text} for text in [*texts_of(10), "Diana is in Paris"]))
    found = read_texts(DataSpec(**rows_of(40)), held_out=apart)
    assert found.held_out == ("Diana is in Paris",)
    assert found.about["held_out"]["dropped"] == 10
    assert len(found.fitted) + len(found.choosing) == 40


def test_a_fit_is_not_measured_on_its_own_data(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(20)["rows"]))
    data = DataSpec(file=str(file))
    with pytest.raises(
        DataError,
        match=r"held_out names the same data as is fitted on, data\.file=.*A score on the data of the fit",
    ):
        read_texts(data, held_out=data)
    other = tmp_path / "copy.jsonl"
    other.write_text(file.read_text())
    with pytest.raises(DataError, match=r"every text of held_out, .*copy\.jsonl', is among those"):
        read_texts(data, held_out=DataSpec(file=str(other)))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, r"which column of data\.rows holds the texts\? It has a, b\. Name it"),
        ([{"a": "x"}], {"column": "b"}, r"has no column 'b'; it has a\."),
        ([{"a": 1}], {"column": "a"}, r"column 'a' of data\.rows holds no text"),
        ([{"a": "x"}, {"a": "y"}], {}, r"has 2 different texts; a fit needs at least 3"),
        ([{"a": "x"}], {"held_out": 1.0}, r"held_out=1\.0 is not a share"),
    ],
)
def test_texts_that_make_no_fit(rows, options, message):
    with pytest.raises(DataError, match=message):
        read_texts(DataSpec(rows=tuple(rows)), **options)


def test_the_column_is_the_only_one_with_texts_or_text():
    for rows in ([{"n": 1, "words": "x"}], [{"other": "y", "text": "x"}]):
        many = tuple(
            {name: f"{value}{number}" if isinstance(value, str) else value for name, value in row.items()}
            for row in rows
            for number in range(5)
        )
        assert read_texts(DataSpec(rows=many)).fitted[0].startswith("x")


# Alignment.


def encoded(*ends, text="abcdefgh", specials=0):
    spans = [(0, 0)] * specials + [(start, end) for start, end in zip((0, *ends), ends, strict=False)]
    return Encoded(text, tuple(range(len(spans))), tuple(spans), tuple("x" for _ in spans))


@pytest.mark.parametrize(
    ("one", "other", "options", "expected"),
    [
        (encoded(1, 3, 8), encoded(1, 3, 8), {}, [(1, 1), (2, 2)]),
        (encoded(1, 3, 8), encoded(1, 3, 8), {"skip": 0}, [(0, 0), (1, 1), (2, 2)]),
        (encoded(2, 5, 8), encoded(1, 2, 4, 5, 8), {}, [(1, 3), (2, 4)]),
        (encoded(2, 5, 8), encoded(3, 6), {}, []),
        (encoded(2, 5, 8, specials=1), encoded(2, 5, 8), {}, [(2, 1), (3, 2)]),
        (encoded(2, 5, 8), encoded(1, 2, 4, 5, 8), {"most": 4}, [(1, 3)]),
        # Three bytes of one letter are three tokens that end at one character: the last has read it.
        (encoded(1, 3, 8), encoded(1, 3, 3, 3, 8), {}, [(1, 1), (2, 4)]),
    ],
)
def test_tokens_are_aligned_where_they_end(one, other, options, expected):
    assert aligned(one, other, **options) == expected


def test_bytes_of_one_letter_count_as_its_last():
    one = Encoded("aé", (0, 1, 2, 3), ((0, 1), (1, 2), (1, 2), (2, 3)), tuple("wxyz"))
    other = Encoded("aé", (0, 1, 2), ((0, 1), (1, 2), (2, 3)), tuple("xyz"))
    assert aligned(one, other) == [(2, 1), (3, 2)]


def test_two_texts_are_not_aligned():
    with pytest.raises(InputError, match="their tokens cannot be aligned"):
        aligned(encoded(1), encoded(1, text="other"))
    real = encode("The Eiffel Tower", tiny.TOKENIZER, field="x")
    assert aligned(real, real) == [(place, place) for place in range(1, len(real.ids))]


# Pairs.


@pytest.mark.parametrize(
    ("pairs", "options", "expected"),
    [
        ("same", {}, [(0, 0), (1, 1), (2, 2)]),
        ("same", {"source_layers": [1, -1]}, [(1, 1)]),
        ("last", {"source_layers": ["embed", 0]}, [(-1, 2), (0, 2)]),
        ("cross", {"source_layers": "0:2", "target_layers": [0, 2]}, [(0, 0), (0, 2), (1, 0), (1, 2)]),
        ("3:1,embed:-1, 0:0", {}, [(-1, 2), (0, 0), (3, 1)]),
        ([(3, 1), (-1, 2)], {}, [(-1, 2), (3, 1)]),
        ("last", {"n_source": 3, "one_model": True}, [(0, 2), (1, 2)]),
    ],
)
def test_pairs_that_are_named(pairs, options, expected):
    assert parse_pairs(pairs, **{"n_source": 4, "n_target": 3} | options) == tuple(expected)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ("sam", {}, r"'sam' is not a valid pair of layers\. Use same, last, cross, or pairs like 3:5"),
        ("4:0", {}, "pairs: l=4 is outside this model, whose 4 blocks are"),
        ("0:3", {}, r"pairs: l\*=3 is outside this model"),
        ([(1, 2, 3)], {}, "is not a valid pair of layers"),
        ("cross", {"target_layers": "x"}, "target_layers: 'x' is not a valid layer"),
        ("same", {"one_model": True}, "leaves nothing to fit: a layer of one model needs no map to itself"),
    ],
)
def test_pairs_that_are_none(pairs, options, message):
    with pytest.raises(LayerError, match=message):
        parse_pairs(pairs, **{"n_source": 4, "n_target": 3} | options)


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "afine"}, "Did you mean 'affine'"),
        ({"rank": 3}, "only kind low_rank has a rank"),
        ({"kind": "low_rank"}, "only kind low_rank has a rank"),
        ({"lambdas": [0.1, 0.01]}, "lambdas: should increase"),
        ({"lambdas": []}, "lambdas"),
        ({"held_out": 1.0}, "held_out"),
        ({"limt": 3}, "Did you mean 'limit'"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(SpecError, match=message):
        Fit(**options)


# A fit.


def test_a_fit_says_all_of_where_it_comes_from(tiny_model, tmp_path):
    said = []
    found = fit_mapping(
        model=tiny_model(),
        target_model=tiny_model("gpt2", d_model=48),
        pairs="0:1,2:3",
        data=rows_of(30),
        out=tmp_path / "fit.safetensors",
        command="made by hand",
        progress=lambda done, total: said.append((done, total)),
    )
    loaded = Fitted.load(tmp_path / "fit.safetensors")
    assert loaded.about == found.about
    assert loaded.pairs == ((0, 1), (2, 3))
    about = loaded.about
    assert (about.source_model.d_model, about.target_model.d_model) == (32, 48)
    assert about.command == "made by hand"
    assert about.data["fitted_on"]["n_texts"] == 24
    assert about.data["held_out"]["n_texts"] == 6
    assert about.data["held_out"]["n_positions"] == about.held_out[0, 1]["n"] > 0
    assert about.settings["kind"] == "affine"
    assert [one[:2] for one in about.settings["pairs"]] == [[0, 1], [2, 3]]
    assert said[-1] == (30, 30)
    assert [done for done, _ in said] == sorted(done for done, _ in said)


@pytest.mark.parametrize("kind", ["orthogonal", "scale"])
def test_kinds_that_need_one_size(kind, tiny_model):
    with pytest.raises(InputError, match=rf"{kind} maps between spaces of one size; these have 32 and 48"):
        fit_mapping(
            kind,
            model=tiny_model(),
            target_model=tiny_model("gpt2", d_model=48),
            pairs="0:1",
            data=rows_of(10),
        )


def test_a_rank_that_is_too_large(tiny_model):
    with pytest.raises(InputError, match="rank=33 is more than the smaller space has dimensions, 32"):
        fit_mapping("low_rank", model=tiny_model(), pairs="0:1", data=rows_of(10), rank=33)


def test_texts_too_short_for_any_position(tiny_model):
    data = {"rows": [{"text": letter} for letter in "abcdefgh"]}
    with pytest.raises(DataError, match="the texts to fit on have no position that both models read"):
        fit_mapping(model=tiny_model(), pairs="0:1", data=data)


def test_few_positions_are_a_notice_and_so_is_the_end_of_a_grid(tiny_model):
    said = []
    options = {"model": tiny_model(), "pairs": "0:1", "notice": said.append}
    fit_mapping(data=rows_of(10), positions=2, lambdas=[1e-6, 1e-5], **options)
    assert said[0].startswith("fitted on 16 positions, for states of 32 dimensions")
    assert said[1:] == ["lambda is at an end of its grid for 1 of 1 pairs."]
    said.clear()
    fit_mapping(data=rows_of(100), lambdas=[1e-2], **options)
    assert said == []


def test_as_many_positions_as_asked(tiny_model):
    found = fit_mapping(model=tiny_model(), pairs="0:1", data=rows_of(20), positions=3)
    assert found.about.data["fitted_on"]["n_positions"] == 3 * 16
    again = fit_mapping(model=tiny_model(), pairs="0:1", data=rows_of(20), positions=3)
    other = fit_mapping(model=tiny_model(), pairs="0:1", data=rows_of(20), positions=3, seed=1)
    assert torch.equal(found.parts((0, 1))["weight"], again.parts((0, 1))["weight"])
    assert not torch.equal(found.parts((0, 1))["weight"], other.parts((0, 1))["weight"])


def test_pairs_that_do_not_fit_into_memory_are_fitted_one_after_the_other(tiny_model, monkeypatch):
    options = {"model": tiny_model(), "pairs": "0:1,0:2,1:3", "data": rows_of(30)}
    together = fit_mapping(**options)
    monkeypatch.setattr("patchscope_nn.fitting.closed.fit._MEMORY", 1)
    assert list(_chunks([(1, 3), (0, 1), (0, 2)], 32, 32)) == [[(0, 1)], [(0, 2)], [(1, 3)]]
    apart = fit_mapping(**options)
    for name, tensor in together.state_dict().items():
        torch.testing.assert_close(apart.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


# In a run.


def scope_of(mapping, *, layers=(0, 2), targets=(1, 3)):
    return Patchscope(
        source=Source(prompt="Diana", layer=list(layers)),
        target=Target(prompt="x is", position="x", layer=list(targets)),
        mapping=mapping,
    )


FIT = {"fit": {"kind": "affine", "data": rows_of(30), "lambdas": [0.01]}}


@pytest.mark.quick
def test_a_run_fits_its_mapping_once(cache, tiny_model, tmp_path, monkeypatch):
    models = {"source_model": tiny_model(), "target_model": tiny_model("gpt2", d_model=48)}
    prepared = prepare(scope_of(FIT), **models).only
    assert not prepared.fit.done
    assert not cache.exists()
    assert prepared.mapping.maps[0, 1]["weight"].device.type == "meta"
    first = ps.run(scope_of(FIT), out=tmp_path / "run", **models)
    (file,) = cache.glob("fits/*.safetensors")
    fitted = Fitted.load(file)
    assert fitted.pairs == ((0, 1), (0, 3), (2, 1), (2, 3))
    said = first.manifest["mapping"]
    assert said["name"] == "fit:affine"
    assert said["weights"] == prepared.mapping.digest
    assert said["fit"]["file"] == str(file)
    assert said["fit"]["held_out"] == fitted.about.dump()["held_out"]
    assert len(said["fit"]["sha256"]) == 64
    assert set(first.table()["mapping"]) == {"fit:affine"}
    monkeypatch.setattr("patchscope_nn.fitting.cached.fit_pairs", None)  # whoever calls it fails
    assert prepare(scope_of(FIT), **models).only.fit.done
    again = ps.run(scope_of(FIT), out=tmp_path / "run", **models)
    assert again.manifest["hash"] == first.manifest["hash"]
    same = ps.run(scope_of({"fitted": str(file)}), **models)
    for one, other in zip(first.rows, same.rows, strict=True):
        assert one["top_ids"] == other["top_ids"]


def test_what_decides_a_fit_decides_where_it_is_kept(tiny_model):
    def key(mapping=FIT, source=None, target=None, **options):
        models = {"source_model": source or tiny_model(), "target_model": target or tiny_model("gpt2")}
        return prepare(scope_of(mapping, **options), **models).only.fit.key

    def changed(**more):
        return {"fit": {**FIT["fit"], **more}}

    keys = [
        key(),
        key(changed(lambdas=[0.1])),
        key(changed(seed=1)),
        key(changed(positions=4)),
        key(changed(kind="orthogonal")),
        key(changed(data=rows_of(29))),
        key(changed(held_out=0.3)),
        key(source=tiny_model(seed=1)),
        key(target=tiny_model("gpt2", seed=1)),
        key(layers=(0, 1)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    assert key(source=tiny_model(copy=1)) == keys[0]  # the same weights, loaded again


def test_aligned_is_identity_within_one_model_and_a_fit_between_two(tiny_model):
    one = prepare(scope_of("aligned"), model=tiny_model()).only
    assert (one.mapping.kind, one.fit) == ("identity", None)
    copies = prepare(scope_of("aligned"), source_model=tiny_model(), target_model=tiny_model(copy=1)).only
    assert (copies.mapping.kind, copies.fit) == ("identity", None)
    models = {"source_model": tiny_model(), "target_model": tiny_model("gpt2", d_model=48)}
    two, asked = (prepare(scope_of(mapping), **models).only for mapping in ("aligned", {"fit": {}}))
    assert two.fit.key == asked.fit.key
    assert two.mapping.name == "fit:affine"


def test_within_one_model_a_layer_is_mapped_to_itself_as_it_is(tiny_model):
    same = Patchscope(source=Source(prompt="Diana", layer=[0, 1]), target=Target(prompt="x is"), mapping=FIT)
    assert prepare(same, model=tiny_model()).only.mapping.kind == "identity"
    some = prepare(scope_of(FIT, layers=(1,), targets=(1, 3)), model=tiny_model()).only
    mapping = fit_first(some).mapping
    assert mapping.maps[1, 1].keys() == {"scale"}
    assert mapping.maps[1, 1]["scale"].item() == 1
    assert mapping.maps[1, 3].keys() == {"weight", "bias"}
    assert [one[:2] for one in mapping.about["held_out"]] == [[1, 3]]


def test_a_fit_that_is_asked_for_wrongly():
    for mapping, message in [
        ({"fit": {"kind": "afine"}}, r"fit\.kind: 'afine' is not allowed here\. Did you mean 'affine'"),
        ({"fit": 3}, r"fit: 3 should be fields, for example \{kind: affine\}"),
        ("alligned", "Did you mean 'aligned'"),
    ]:
        with pytest.raises(SpecError, match=message):
            scope_of(mapping)
    assert scope_of({"fit": "affine"}).mapping == Fit()
    assert scope_of(FIT).model_dump(mode="json")["mapping"]["fit"]["data"] == rows_of(30)


def test_no_state_is_written_by_the_file_of_another_sweep(tiny_model, tmp_path):
    """What `patchscope fit` wrote for some pairs says which it has."""
    file = fits.random_fit([(0, 1)]).save(tmp_path / "fit.safetensors")
    with pytest.raises(
        InputError, match=r"no map for \(l:l\*\) 0:3, 2:1, 2:3\. It has maps for \(l:l\*\) 0:1"
    ):
        prepare(scope_of({"fitted": str(file)}), model=tiny_model())
