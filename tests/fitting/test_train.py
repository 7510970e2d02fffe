"""What a recipe asks to be trained before the run: kept once, checked first, and the same as `ps.fit`."""

from __future__ import annotations

import pytest
import tiny
import torch

import patchscope_nn as ps
from patchscope_nn.backends import Places
from patchscope_nn.cli.plan_printing import _fit_line
from patchscope_nn.errors import (
    DataError,
    InputError,
    LayerError,
    MappingError,
    ModelError,
    SpecError,
)
from patchscope_nn.fitting import fit_trained
from patchscope_nn.fitting.texts import DEFAULT_COLUMN, DEFAULT_DATA
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.mappings import Fitted
from patchscope_nn.runs.execute import fit_first
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.spec import TRAIN_KINDS, Patchscope, Source, Target, Train

TEXTS = ["".join(tiny.PIECES[(7 * i + j * (i % 5 + 1)) % 13] for j in range(8)) for i in range(30)]
LETTERS = "abcdefghijklmnop"
WORDS = [
    {"word": "".join(LETTERS[(3 * i + j * (i % 7 + 1)) % 16] for j in range(2)), "said": f" {LETTERS[i]}"}
    for i in range(12)
]
SOURCE = Source(prompt="The city of {word}", layer=["embed", 2])
LENS = {"data": {"rows": [{"text": text} for text in TEXTS]}, "held_out": 0.3, "skip_first": 2}
STEPS = {"steps": 3, "batch": 4, "learning_rate": 0.01}
THROUGH = {"data": {"rows": WORDS}, "text": "{said}", **STEPS}
#: For each kind, what a recipe says of it, and what `fit_trained` is told of the same.
RELATION = {"prompt": "The city of {word} is", "subject": "word", "subjects": 3, "beta": 2.0, "rank": 4}
ASKED = {
    "tuned_lens": LENS | STEPS,
    "jacobian_lens": LENS,
    "lre": {"data": {"rows": WORDS}, **RELATION},
    "trained_scale": THROUGH,
    "trained_scalar_affine": THROUGH,
    "trained_low_rank": THROUGH | {"rank": 3},
    "trained_affine": THROUGH,
}


def given(kind):
    """The same as `ASKED`, as `fit_trained` takes it."""
    shares = {name: value for name, value in ASKED[kind].items() if name not in STEPS}
    layers = {"layers": ["embed", 2]}
    if kind == "tuned_lens":
        training = Training(**STEPS, held_out=shares.pop("held_out"))
        return shares | layers | {"training": training}
    if kind in ("jacobian_lens", "lre"):
        return shares | layers
    return shares | {"source": SOURCE, "target": target(kind), "training": Training(**STEPS)}


def target(kind):
    if kind in ("tuned_lens", "jacobian_lens", "lre"):
        return Target(layer=-1)
    return Target(prompt="The Paris -> x", position="x", layer=1)


def scope_of(kind, *, source=SOURCE, to=None, **changed):
    mapping = {"train": {"kind": kind, **ASKED[kind], **changed}}
    return Patchscope(source=source, target=to or target(kind), mapping=mapping)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_kind_has_a_test():
    assert set(ASKED) == set(TRAIN_KINDS)


@pytest.mark.parametrize("kind", TRAIN_KINDS)
def test_a_run_trains_its_mapping_once(kind, cache, tiny_model, monkeypatch):
    model, data = tiny_model(), WORDS[:2]
    prepared = prepare(scope_of(kind), model=model, data=data).only
    assert not prepared.fit.done
    assert not cache.exists()
    first = ps.run(scope_of(kind), model=model, data=data)
    (file,) = cache.glob("fits/*.safetensors")
    fitted, alone = Fitted.load(file), fit_trained(kind, model=model, **given(kind))
    assert fitted.pairs == alone.pairs
    for name, tensor in alone.state_dict().items():
        assert torch.equal(fitted.state_dict()[name], tensor), name
        assert tuple(prepared.mapping.maps[fitted.pairs[0]][name.split("_")[0]].shape) == tensor.shape
    assert fitted.about.held_out == alone.about.held_out
    said = first.manifest["mapping"]
    assert (said["name"], said["weights"]) == (f"train:{kind}", prepared.mapping.digest)
    assert said["fit"]["held_out"] == fitted.about.dump()["held_out"]
    assert set(first.table()["mapping"]) == {f"train:{kind}"}
    monkeypatch.setattr("patchscope_nn.fitting.planned_training.fit_trained", None)  # whoever calls it fails
    again = ps.run(scope_of(kind), model=model, data=data, remote="local")
    same = ps.run(
        scope_of(kind).model_copy(update={"mapping": ("fitted", str(file))}), model=model, data=data
    )
    assert again.manifest["hash"] == first.manifest["hash"]
    for rows in (again.rows, same.rows):
        assert [row["top_ids"] for row in rows] == [row["top_ids"] for row in first.rows]


def test_what_decides_a_training_decides_where_it_is_kept(tiny_model):
    def key(kind="trained_affine", model=None, **options):
        return prepare(scope_of(kind, **options), model=model or tiny_model(), data=WORDS[:2]).only.fit.key

    keys = [
        key(),
        key("trained_scale"),
        key(steps=4),
        key(seed=1),
        key(text="{said}!"),
        key(limit=11),
        key(data={"rows": WORDS[:11][::-1]}),
        key(source=SOURCE.model_copy(update={"layer": 2})),
        key(source=SOURCE.model_copy(update={"prompt": "{word}"})),
        key(to=Target(prompt="The Paris -> x", layer=1, position=0)),
        key(model=tiny_model(seed=1)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    assert key(model=tiny_model(copy=1)) == keys[0]  # the same weights, loaded again
    assert key("tuned_lens") == key("tuned_lens", to=Target(prompt="x", layer=-1))  # T decides no lens


def test_of_the_last_block_a_lens_learns_nothing(tiny_model):
    source = Source(prompt="The {word}", layer=[2, 3])
    some = fit_first(prepare(scope_of("tuned_lens", source=source), model=tiny_model(), data=WORDS[:1]).only)
    assert {name: one.item() for name, one in some.mapping.maps[3, 3].items()} == {"scale": 1}
    assert some.mapping.maps[2, 3].keys() == {"weight", "bias"}
    assert [one[:2] for one in some.mapping.about["held_out"]] == [[2, 3]]
    last = scope_of("tuned_lens", source=Source(prompt="The {word}", layer=-1))
    found = prepare(last, model=tiny_model(), data=WORDS[:1]).only
    assert (found.mapping.kind, found.fit) == ("identity", None)


def test_without_data_a_lens_reads_texts_that_ship(tiny_model):
    named = {"kind": "tuned_lens", "data": dict(DEFAULT_DATA), "column": DEFAULT_COLUMN}
    scopes = [
        Patchscope(source=Source(prompt="x"), target=Target(layer=-1), mapping={"train": asked})
        for asked in ("tuned_lens", named)
    ]
    found, same = (prepare(scope, model=tiny_model()).only.fit for scope in scopes)
    assert found.key == same.key
    assert found.about["data"]["n_rows"] > 200


CROSSED = {"tuned_lens": {"layer": 2}, "jacobian_lens": {"layer": "same"}, "lre": {"layer": [2, 3]}}


@pytest.mark.parametrize("kind", CROSSED)
def test_a_map_to_the_last_block_is_written_there(kind, tiny_model):
    scope = scope_of(kind, to=Target(prompt="x", **CROSSED[kind]))
    with pytest.raises(LayerError, match=rf"{kind} maps to the last block, .* 3; .* Write target\.layer: -1"):
        prepare(scope, model=tiny_model(), data=WORDS[:1])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("tuned_lens", {"source": Source(prompt="x", site="mlp")}), MappingError, "sites mlp and residual"),
        (
            ("tuned_lens", {"column": "txt"}),
            DataError,
            r"column='txt' is not a column .* Did you mean 'text'",
        ),
        (("tuned_lens", {"data": {"rows": WORDS}}), DataError, "columns word, said, and none was named"),
        (("tuned_lens", {"skip_first": 50}), DataError, "none of 30 texts has 51 tokens or more"),
        (("jacobian_lens", {"limit": 1}), DataError, "are too few"),
        (("lre", {"subject": "wrod"}), DataError, r"subject='wrod' is not a column .* Did you mean 'word'"),
        (("lre", {"subjects": 12}), DataError, "12 different prompts are too few to fit on 12"),
        (("lre", {"prompt": "The city"}), DataError, "does not name the subject"),
        (("trained_scale", {"text": "{siad}"}), DataError, "text asks for the column 'siad'"),
        (("trained_scale", {"limit": 2}), DataError, "2 different source prompts are too few"),
        (("trained_scale", {"to": Target()}), InputError, "target.prompt was not given"),
        (("trained_scale", {"to": Target(prompt="x", write="add")}), MappingError, "target.write='add'"),
        (("trained_low_rank", {"rank": 33}), MappingError, "32 numbers and 32; its rank is 33"),
    ],
)
def test_what_cannot_be_trained_says_so_before_anything_runs(given, error, message, cache, tiny_model):
    kind, changed = given
    with pytest.raises(error, match=message):
        prepare(scope_of(kind, **changed), model=tiny_model(), data=WORDS[:1])
    assert not cache.exists()


def test_models_that_are_two(tiny_model):
    two = {"source_model": tiny_model(), "target_model": tiny_model("gpt2")}
    with pytest.raises(MappingError, match="this run has LlamaForCausalLM and GPT2LMHeadModel"):
        prepare(scope_of("tuned_lens"), **two, data=WORDS[:1])
    fit = prepare(scope_of("trained_affine"), **two, data=WORDS[:1]).only.fit
    assert fit.target.info.name.startswith("GPT2")
    wide = two | {"target_model": tiny_model("gpt2", d_model=48)}
    with pytest.raises(MappingError, match=r"32 numbers and 48\. .* else \{fit: affine\}"):
        prepare(scope_of("trained_affine"), **wide, data=WORDS[:1])


def saved(folder, *, seed):
    tiny.make_module("llama", seed=seed).save_pretrained(folder)
    tiny.TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["tuned_lens", "trained_scale"])
def test_what_was_trained_here_serves_a_run_on_a_server(kind, tmp_path):
    name = saved(tmp_path / "model", seed=0)
    there = {"model": name, "data": WORDS[:1], "places": Places.of("http://localhost:1")}
    with pytest.raises(
        ModelError, match=r"whose weights are not in this process\. Run it once here, without --remot"
    ):
        prepare(scope_of(kind), **there)
    here = fit_first(prepare(scope_of(kind), model=name, data=WORDS[:1]).only)
    found = prepare(scope_of(kind), **there).only
    assert found.fit.done
    assert found.digest == here.digest
    for pair, parts in here.mapping.maps.items():
        for part, tensor in parts.items():
            assert torch.equal(found.mapping.maps[pair][part], tensor)
    saved(tmp_path / "model", seed=1)
    fit_first(prepare(scope_of(kind), model=name, data=WORDS[:1]).only)
    with pytest.raises(ModelError, match=r"2 trainings of .* are kept .* mapping: \{fitted: "):
        prepare(scope_of(kind), **there)


def test_a_training_that_is_asked_for_wrongly():
    for mapping, message in [
        ({"train": {"kind": "tuned_lns"}}, r"train\.kind: 'tuned_lns' is not .* Did you mean 'tuned_lens'"),
        ({"train": {"kind": "affine"}}, r"Did you mean 'trained_affine'"),
        ({"train": 3}, r"train: 3 should be fields, for example \{kind: tuned_lens\}"),
        (
            {"train": {"kind": "tuned_lens", "text": "a"}},
            r"train: tuned_lens does not take text; leave it out",
        ),
        ({"train": {"kind": "lre", "data": {}}}, r"lre needs prompt and subject, as in \{kind: lre"),
        ({"train": "trained_scale"}, r"trained_scale needs data and text, as in \{kind: trained"),
        ({"train": {"kind": "tuned_lens", "steps": 0}}, r"train\.steps: .* greater than or equal to 1"),
    ]:
        with pytest.raises(SpecError, match=message):
            Patchscope(source=SOURCE, mapping=mapping)
    scope = scope_of("lre")
    assert scope.model_dump(mode="json")["mapping"]["train"] == {"kind": "lre", **ASKED["lre"]}
    assert Patchscope(source=SOURCE, mapping={"train": "tuned_lens"}).mapping == Train(kind="tuned_lens")


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("tuned_lens", "nats KL of the logit lens"), ("lre", "faithfulness"), ("trained_scale", "nats a token")],
)
def test_a_plan_says_what_is_to_be_trained_and_then_how_well_it_does(kind, numbers, tiny_model):
    prepared = prepare(scope_of(kind), model=tiny_model(), data=WORDS[:1]).only
    said = _fit_line(prepared.mapping)
    n_rows = len(ASKED[kind]["data"]["rows"])
    assert said == (
        f"mapping train:{kind}: 2 pairs of layers, to be trained before the run on {n_rows} rows, some of "
        f"them held out, and saved in {prepared.fit.file}"
    )
    after = _fit_line(fit_first(prepared).mapping)
    assert after.startswith(f"mapping train:{kind}: {kind}, 2 pairs of layers; on held-out rows ")
    assert numbers in after
    assert after.endswith(f"; {prepared.fit.file}")
