"""Recipes load, change and dump without loss, without torch, and as their JSON Schema says."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscope_nn.data.rows import DataSpec
from patchscope_nn.metrics import parse_metric
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.recipe import Recipe, dump, find, json_schema, lint, load_recipe, resolved, shipped
from patchscope_nn.recipe.document import read_yaml
from patchscope_nn.spec import Patchscope, Source, Target, prompts
from patchscope_nn.spec.positions import Each, Span

ROOT = Path(__file__).parents[2]
GOOD = {"name": "a", "title": "b", "source": {"prompt": "x"}}
TEXT = "name: a\ntitle: b\nsource: {prompt: x}\n"


def load(folder, text, *sets, **overrides):
    path = folder / "r.yaml"
    path.write_bytes(text.encode())
    return load_recipe(path, sets=sets, overrides=overrides)


# The recipes that ship.


def test_a_recipe_that_ships_is_found_by_its_name():
    assert "next-token" in shipped()
    assert find("next-token") == ROOT / "recipes" / "next-token.yaml"


def test_what_the_shipped_recipes_ask():
    identity, lens, description = (
        load_recipe(name) for name in ("next-token", "logit-lens", "entity-description")
    )
    source = Source(prompt="{context}", position=-1, layer="all")
    readout = NextToken(top_k=5, reference="source")
    assert identity.scope == Patchscope(
        source=source,
        target=Target(prompt=prompts.IDENTITY, position=-1, layer="same"),
        readout=readout,
    )
    assert lens.scope == Patchscope(source=source, target=Target(layer=-1), readout=readout)
    assert (lens.data, lens.metrics, lens.controls) == (identity.data, identity.metrics, identity.controls)
    assert description.scope == Patchscope(
        source=Source(prompt="{entity}"),
        target=Target(prompt=prompts.DESCRIBE, position="x"),
        mapping="aligned",
        readout=Generate(max_new_tokens=20, stop="\n"),
    )
    assert description.metrics == (parse_metric({"rouge_l": {"reference": "description"}}),)


# Files.


@pytest.mark.parametrize(
    "text", [TEXT, "\ufeff" + TEXT, TEXT.replace("\n", "\r\n"), "---\n" + TEXT + "...\n"]
)
def test_line_ends_and_marks_do_not_matter(text, tmp_path):
    assert load(tmp_path, text) == Recipe(**GOOD)


def test_a_recipe_without_the_rest_has_the_defaults(tmp_path):
    recipe = load(tmp_path, TEXT)
    assert recipe.model == "builtin:smollm2-135m-instruct"
    assert (recipe.data, recipe.metrics, recipe.controls, recipe.seed) == (None, (), (), 0)
    assert dump(recipe) == GOOD


def test_scalars_are_read_as_yaml_1_2_reads_them():
    text = "[5:10, yes, no, on, 2024-01-02, 0x1f, 012, 1_000, true, ~, -3, 0, 1.5, 1.0e-3, .5]"
    assert read_yaml(text).value == [
        *("5:10", "yes", "no", "on", "2024-01-02", "0x1f", "012", "1_000"),
        *(True, None, -3, 0, 1.5, 1e-3, 0.5),
    ]


def written(plain):
    """What PyYAML writes, escaped and not; unescaped, its own reader makes a space of U+0085."""
    yield yaml.safe_dump(plain, allow_unicode=False)
    if "\x85" not in json.dumps(plain, ensure_ascii=False):
        yield yaml.safe_dump(plain, allow_unicode=True)


@settings(max_examples=200)
@given(st.text(st.sampled_from("0123456789.:eE+-_xobyYnN~<=tf' ")) | st.text() | st.floats(allow_nan=False))
def test_what_pyyaml_writes_reads_the_same(value):
    for text in written({"a": value}):
        assert read_yaml(text).value == {"a": value}


def test_aliases_and_merges(tmp_path):
    text = "name: a\ntitle: b\nsource: &s {prompt: x, layer: 3}\ntarget: {<<: *s, layer: 4}\n"
    recipe = load(tmp_path, text, "source.layer=5")
    assert (recipe.source.layer, recipe.target.layer, recipe.target.prompt) == (5, 4, "x")


def test_data_files_start_from_the_recipe_s_folder(tmp_path):
    (tmp_path / "rows.csv").write_text("city\nParis\n")
    path = tmp_path / "r.yaml"
    path.write_text('name: a\ntitle: b\nsource: {prompt: "{city}"}\ndata: {file: rows.csv}\n')
    assert lint(path) == []


# Changes.

SETS = [
    ("", ["source.layer=5:10", "seed=3"], {"source": {"prompt": "x", "layer": "5:10"}, "seed": 3}),
    ("", ["source.layer=::3"], {"source": {"prompt": "x", "layer": "::3"}}),
    ("", ["source.layer=1", "source.layer=[0, -1]"], {"source": {"prompt": "x", "layer": [0, -1]}}),
    ("", ["source.position.each=all"], {"source": {"prompt": "x", "position": {"each": "all"}}}),
    ("", ["title=a=b"], {"title": "a=b"}),
    ("", ["readout.next_token.top_k=2"], {"readout": {"next_token": {"top_k": 2}}}),
    ("", ["data.builtin=contexts"], {"data": {"builtin": "contexts"}}),
    ("paper: p", ["paper="], {}),
    ("mapping: target_norm", ["mapping.affine=w.safetensors"], {"mapping": {"affine": "w.safetensors"}}),
    (
        "readout: generate",
        ["readout.generate.max_new_tokens=5"],
        {"readout": {"generate": {"max_new_tokens": 5}}},
    ),
    ("readout: {generate: }", ["readout.generate.stop=a"], {"readout": {"generate": {"stop": "a"}}}),
    (
        "readout: {generate: {stop: a}}",
        ["readout.generate.max_new_tokens=5"],
        {"readout": {"generate": {"max_new_tokens": 5, "stop": "a"}}},
    ),
    ("readout: generate", ["readout=hidden"], {"readout": "hidden"}),
    (
        "readout: generate\nmetrics: [{rouge_l: {reference: d}}]",
        ["metrics.0.rouge_l.reference=e"],
        {"readout": "generate", "metrics": [{"rouge_l": {"reference": "e"}}]},
    ),
]


@pytest.mark.parametrize(("text", "sets", "expected"), SETS)
def test_set(text, sets, expected, tmp_path):
    assert dump(load(tmp_path, f"{TEXT}{text}\n", *sets)) == {**GOOD, **expected}


def test_sets_win_over_overrides_and_overrides_over_the_file(tmp_path):
    overrides = {"model": "b", "source.model": "c"}
    recipe = load(tmp_path, TEXT + "model: a\n", "source.model=d", **overrides)
    assert (recipe.model, recipe.source.model) == ("b", "d")


# Round trips.

LAYER = st.integers() | st.sampled_from(["all", "embed", "1:", ":-1", "0:9:2"])
LAYERS = LAYER | st.lists(LAYER, min_size=1, max_size=3).map(tuple)
NAMED = st.text(min_size=1).filter(lambda text: text != "first:")
POSITION = st.integers() | NAMED
SPANS = st.builds(Span, start=st.integers(), end=st.none() | st.integers())
POSITIONS = (
    POSITION
    | SPANS
    | st.lists(POSITION, min_size=1, max_size=3).map(tuple)
    | st.builds(Each, each=st.just("all") | st.lists(POSITION | SPANS, min_size=1, max_size=3))
)
PROMPTS = (
    st.text(min_size=1)
    | st.lists(st.integers(), min_size=1, max_size=3).map(tuple)
    | st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=2).map(tuple)
)
SITES = st.sampled_from(["residual", "attention", "mlp"])
MODELS = st.none() | st.text()
SOURCES = st.builds(Source, prompt=PROMPTS, position=POSITIONS, layer=LAYERS, site=SITES, model=MODELS)
TARGETS = st.builds(
    Target,
    prompt=st.none() | PROMPTS,
    position=st.none() | POSITIONS,
    layer=LAYERS | st.just("same"),
    site=SITES,
    model=MODELS,
)
TEXTS = st.lists(st.text(), min_size=2, max_size=3).map(tuple)
COLUMN = st.text(min_size=1)
REFERENCED = NextToken(reference="source")
MEASURED = st.one_of(
    st.tuples(
        st.builds(NextToken, top_k=st.integers(1, 1000), reference=st.none() | TEXTS, position=st.integers()),
        st.just(()),
    ),
    st.tuples(
        st.just(REFERENCED), st.permutations(["precision_at_1", "nll_nats", "surprisal_nats"]).map(tuple)
    ),
    st.tuples(
        st.builds(
            Generate,
            max_new_tokens=st.integers(1),
            stop=st.none() | st.text(min_size=1),
            temperature=st.floats(0, allow_infinity=False),
            seed=st.integers(0),
        ),
        st.tuples(COLUMN.map(lambda column: parse_metric({"rouge_l": {"reference": column}}))),
    ),
    st.tuples(
        st.builds(Choices, continuations=TEXTS),
        st.tuples(COLUMN.map(lambda column: {"choice_accuracy": {"answer": column}})),
    ),
    st.tuples(st.just(Hidden()), st.just(())),
)
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
DATA = st.one_of(
    st.none(),
    st.builds(DataSpec, builtin=st.sampled_from(["contexts", "entities"])),
    st.builds(DataSpec, file=COLUMN),
    st.builds(DataSpec, hub=COLUMN, split=COLUMN, config=st.none() | COLUMN, revision=st.none() | COLUMN),
    st.builds(
        DataSpec, rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=2), min_size=1, max_size=2)
    ),
)
MAPPING = st.sampled_from(["identity", "target_norm"]) | st.sampled_from(
    [("affine", "w.safetensors"), ("function", "a.b:c")]
)


@st.composite
def recipes(draw):
    readout, metrics = draw(MEASURED)
    return Recipe(
        name=draw(st.from_regex(r"[a-z0-9]{1,4}(-[a-z0-9]{1,4}){0,2}", fullmatch=True)),
        title=draw(st.text(min_size=1)),
        paper=draw(st.none() | st.text()),
        model=draw(st.text(min_size=1)),
        data=draw(DATA),
        source=draw(SOURCES),
        target=draw(TARGETS),
        mapping=draw(MAPPING),
        readout=readout,
        metrics=metrics,
        controls=draw(st.permutations(["unpatched", "random", "shuffled"]))[: draw(st.integers(0, 3))],
        seed=draw(st.integers(0)),
    )


SCHEMA = jsonschema.Draft202012Validator(json_schema())


@settings(max_examples=100)
@given(recipes())
def test_a_dumped_recipe_is_the_same_recipe(recipe):
    for plain in (dump(recipe), resolved(recipe)):
        assert Recipe(**plain) == recipe
        for text in written(plain):
            assert Recipe(**read_yaml(text).value) == recipe
        assert Recipe(**json.loads(json.dumps(plain))) == recipe
        SCHEMA.validate(json.loads(json.dumps(plain)))


def test_dump_leaves_defaults_out_and_resolved_writes_them():
    recipe = Recipe(**GOOD, readout={"next_token": {"reference": "source"}}, metrics=["nll_nats"])
    assert dump(recipe) == {
        **GOOD,
        "readout": {"next_token": {"reference": "source"}},
        "metrics": ["nll_nats"],
    }
    whole = resolved(recipe)
    assert list(whole) == list(Recipe.model_fields)
    assert whole["source"] == {
        "prompt": "x",
        "position": -1,
        "layer": "all",
        "site": "residual",
        "model": None,
        "mean": None,
        "minus": None,
        "vector": None,
    }
    assert whole["readout"] == {"next_token": {"top_k": 5, "reference": "source", "position": -1}}
    assert resolved(Recipe(**GOOD, data={"builtin": "contexts"}))["data"] == {"builtin": "contexts"}


def test_the_scope_keeps_the_models():
    recipe = Recipe(**GOOD | {"source": {"prompt": "x", "model": "m"}, "target": {"model": "n"}})
    assert (recipe.scope.source.model, recipe.scope.target.model) == ("m", "n")


# The JSON Schema.


def test_the_committed_schema_is_up_to_date():
    committed = ROOT / "recipes" / "recipe.schema.json"
    written = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    assert committed.read_text("utf-8") == written, (
        "Write it again: python -c 'import json; from patchscope_nn.recipe import json_schema; "
        "print(json.dumps(json_schema(), indent=2, ensure_ascii=False))' > recipes/recipe.schema.json"
    )


def test_the_schema_documents_every_field():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in (schema, *schema["$defs"].values()):
        assert part["description"]
        for name, field in part["properties"].items():
            assert field["description"], name


VALID = [
    {**GOOD, "best_over": ["target_layer"]},
    {**GOOD, "readout": "hidden", "probe": {"label": "word", "folds": 5}, "score": "probe_accuracy"},
    {**GOOD, "methods": {"a": None, "b": {"target": {"layer": -1}}, "c": {"target.layer": 2}}},
    *({**GOOD, "readout": name} for name in ("next_token", "generate", "hidden")),
    *({**GOOD, "readout": {name: None}} for name in ("next_token", "generate", "hidden")),
    {**GOOD, "readout": {"choices": {"continuations": [" a", " b"]}}},
    *(
        {**GOOD, "readout": {"next_token": {"reference": item}}}
        for item in ("source", " Paris", [" a"], None)
    ),
    *(
        {**GOOD, "mapping": item}
        for item in ("target_norm", {"affine": "w"}, {"fitted": "w"}, {"function": "a:b"})
    ),
    *({**GOOD, "source": {"prompt": "x", "layer": item}} for item in (3, "all", "1:5", [0, "embed", "::2"])),
    *(
        {**GOOD, "source": {"prompt": "x", "position": item}}
        for item in (
            -1,
            "a",
            [0, "a"],
            {"start": 1},
            {"start": 0, "end": -1},
            {"each": "all"},
            {"each": [1, "a"]},
        )
    ),
    *({**GOOD, "source": {"prompt": item}} for item in ("a", [1, 2], [{"role": "user", "content": "hi"}])),
    {**GOOD, "target": {"layer": "same"}},
    {**GOOD, "data": {"hub": "org/name", "split": "test", "config": "en", "revision": "main"}},
    {**GOOD, "data": {"rows": [{"a": 1}]}},
    {**GOOD, "readout": "generate", "metrics": [{"rouge_l": {"reference": "a"}}]},
    {
        **GOOD,
        "readout": {"next_token": {"reference": "source"}},
        "metrics": ["nll_nats", {"precision_at_1": {}}],
    },
    {**GOOD, "controls": ["random"]},
]
INVALID = [
    *({**GOOD, "best_over": item} for item in (["layer"], ["source_layer", "source_layer"], "source_layer")),
    *(
        {**GOOD, "readout": "hidden", "probe": item}
        for item in ({}, {"label": ""}, {"label": "a", "folds": 1})
    ),
    *({**GOOD, "methods": item} for item in ({"a": {}}, {"a": {}, "b": 3}, ["a", "b"], None)),
    {},
    [],
    {"name": "a", "title": "b"},
    {**GOOD, "titel": "b"},
    {**GOOD, "name": "A b"},
    {**GOOD, "title": ""},
    {**GOOD, "model": None},
    {**GOOD, "seed": -1},
    *({**GOOD, "source": item} for item in ("x", {}, {"prompt": ""}, {"prompt": "x", "layr": 1})),
    *({**GOOD, "source": {"prompt": item}} for item in (5, [], ["a"], {"entity": None}, [{"role": "user"}])),
    *({**GOOD, "source": {"prompt": "x", "layer": item}} for item in ("same", "last", 1.5, [], [[1]], None)),
    *(
        {**GOOD, "source": {"prompt": "x", "position": item}}
        for item in ("", [], 1.5, {}, {"end": 1}, {"each": []}, {"each": 1}, [{"start": 1}], None)
    ),
    *({**GOOD, "target": item} for item in ({"layer": "sme"}, {"site": "heads"}, None)),
    *(
        {**GOOD, "mapping": item}
        for item in (
            "identty",
            {"affine": 5},
            {"fitted": 5},
            {"affine": "w", "function": "a:b"},
            {"fit": 3},
            {"fit": {"kind": "afine"}},
            {"fit": {"limt": 3}},
            {"fit": {"lambdas": []}},
            {"fit": {"data": {"builtin": "no such"}}},
            {"train": {"kind": "tuned_lns"}},
            {"train": {"steps": 3}},
            {"train": {"kind": "tuned_lens", "data": {"builtin": "no such"}}},
            None,
        )
    ),
    *(
        {**GOOD, "readout": item}
        for item in ("next_tken", "choices", {}, None, {"generate": {}, "hidden": {}})
    ),
    *(
        {**GOOD, "readout": {"generate": item}}
        for item in ({"top_k": 5}, {"max_new_tokens": 0}, {"max_new_tokens": "5"}, {"stop": ""})
    ),
    *({**GOOD, "readout": {"choices": item}} for item in (None, {}, {"continuations": ["a"]})),
    {**GOOD, "readout": {"next_token": {"top_k": 0}}},
    *(
        {**GOOD, "readout": "generate", "metrics": [item]}
        for item in ("rouge_l", "rouge", {"rouge_l": {}}, {"rouge_l": {"ref": "a"}})
    ),
    *({**GOOD, "controls": item} for item in (["randm"], ["random", "random"], "random")),
    *(
        {**GOOD, "data": item}
        for item in (
            "contexts",
            {},
            {"builtin": "contxts"},
            {"builtin": "contexts", "file": "a.csv"},
            {"file": "a.csv", "split": "test"},
            {"hub": "org/name"},
            {"rows": []},
            {"rows": [1]},
        )
    ),
]


@pytest.mark.parametrize("name", shipped())
def test_the_schema_takes_the_recipes_that_ship(name):
    SCHEMA.validate(yaml.safe_load(find(name).read_text()))


@pytest.mark.parametrize("raw", VALID, ids=str)
def test_schema_and_recipe_take_the_same(raw):
    Recipe(**raw)
    SCHEMA.validate(raw)


@pytest.mark.parametrize("raw", INVALID, ids=str)
def test_schema_and_recipe_refuse_the_same(raw):
    with pytest.raises(ValueError, match="validation error"):
        Recipe.model_validate(raw)
    assert not SCHEMA.is_valid(raw)


# What an import costs.


def test_linting_loads_nothing_heavy():
    code = (
        "import sys, patchscope_nn.recipe as recipe\n"
        "assert not any(recipe.lint(name) for name in recipe.shipped())\n"
        "heavy = {'torch', 'transformers', 'nnsight', 'pandas', 'pyarrow', 'plotly', 'datasets', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_title_is_the_name_unless_it_is_given(tmp_path):
    file = tmp_path / "r.yaml"
    methods = "methods: {one: {}, two: {source.layer: 1}}\n"
    file.write_text(f"name: my-recipe\nsource: {{prompt: x}}\n{methods}")
    recipe = load_recipe(file)
    assert recipe.title == "my-recipe"
    assert [one.title for one in recipe.of_methods().values()] == ["my-recipe (one)", "my-recipe (two)"]
    assert Recipe(**dump(recipe)) == recipe == Recipe(**resolved(recipe))
    assert Recipe(name="my-recipe", source={"prompt": "x"}).title == "my-recipe"
    assert load_recipe(file, sets=["title=Other"]).title == "Other"
    assert "title" not in json_schema()["required"]
