"""The texts of recipe errors, whole: what was given, what is allowed, and where."""

import textwrap

import pytest

from patchscope_nn.data.rows import BUILTIN
from patchscope_nn.errors import InputError, SpecError
from patchscope_nn.recipe import lint, load_recipe, shipped

GOOD = "name: a\ntitle: b\nsource: {prompt: x}\n"
TOP = (
    "Allowed: name, title, paper, model, data, source, target, mapping, readout, columns, metrics, controls, "
    "seed, best_over, probe, score, methods."
)
LAYERS = "give an int (negative counts from the end), a list, 'start:stop[:step]', 'all' or 'embed'"
POSITIONS = (
    "give an index (-1 is the last), a text of the prompt, 'first:text', {start: a, end: b}, "
    "a list of indices and texts, {tokens: text}, {every: text}, or {each: ...}"
)
PROMPTS = "give a text, a list of chat messages ({role: user, content: ...}), or a list of token ids"
READOUTS = "next_token, generate, choices, hidden"
MAPPINGS = (
    "Allowed: identity, target_norm, aligned, affine, function, fitted, tuned_lens, jacobian_lens, fit, "
    "train. Write {affine: weights.safetensors}, {fitted: fit.safetensors}, {fit: {kind: affine}}, {train: "
    "{kind: tuned_lens}}, {function: module:name}, or give a torch module or function in Python."
)
METRICS = (
    "Allowed: precision_at_1, surprisal_nats, nll_nats, kl_nats, top_k_overlap, rank, reciprocal_rank, "
    "rouge_l, rouge_1, contains, relevancy, choice_accuracy, choice_log_odds, cosine, fraction_of_variance."
)
BEGIN = "a recipe is a mapping that begins with name, title and source"

#: YAML below GOOD's three lines -> its problems.
FIELDS = {
    "titel: b": [f"line 4: titel: is not a field here. Did you mean 'title'? {TOP}"],
    "source.layer: 3": [f"line 4: source.layer: is not a field here. Did you mean 'source'? {TOP}"],
    "seed: -1": ["line 4: seed: input should be greater than or equal to 0; given -1"],
    "seed: yes": ["line 4: seed: input should be a valid integer; given 'yes'"],
    "paper: 2401.06102": ["line 4: paper: input should be a valid string; given 2401.06102"],
    "model: ''": ["line 4: model: string should have at least 1 character; given ''"],
    "target:": ["line 4: target: should be a mapping of fields; given None"],
    "target: [1]": ["line 4: target: should be a mapping of fields; given [1]"],
    "target:\n  site: residul": [
        (
            "line 5: target.site: 'residul' is not allowed here. "
            "Did you mean 'residual'? Allowed: residual, before, attention, mlp."
        )
    ],
    "target: {position: [], layer: lst}": [
        f"line 4: target.position: is an empty list; {POSITIONS}",
        f"line 4: target.layer: 'lst' is not a valid layer; {LAYERS} or 'same'",
    ],
    "target: {prompt: {entity}}": [
        (
            f"line 4: target.prompt: {{'entity': None}} is not a valid prompt; {PROMPTS}. "
            'Quote a text that begins with a brace: "{column}"'
        )
    ],
    "mapping: {fit: {kind: afine, limt: 3}}": [
        (
            "line 4: mapping: fit.kind: 'afine' is not allowed here. Did you mean 'affine'? Allowed: affine, "
            "orthogonal, low_rank, scale.; fit.limt: is not a field here. Did you mean 'limit'? Allowed: "
            "kind, data, column, held_out, limit, positions, max_tokens, rank, lambdas, seed."
        )
    ],
    "mapping: {fit: {data: {builtin: context}}}": [
        (
            "line 4: mapping: fit.data.builtin: 'context' is not builtin data. Did you mean 'contexts'? "
            f"Allowed: {', '.join(BUILTIN)}."
        )
    ],
    "mapping: identty": [
        f"line 4: mapping: 'identty' is not a known mapping. Did you mean 'identity'? {MAPPINGS}"
    ],
    "mapping: {function: rotate}": [
        "line 4: mapping: function: 'rotate' should be module:name, for example my_code:my_function"
    ],
    "readout: next_tken": [
        (
            "line 4: readout: 'next_tken' is not a known readout. Did you mean 'next_token'? "
            f"Allowed: {READOUTS}."
        )
    ],
    "readout: {next_token: {}, generate: {}}": [
        (
            "line 4: readout: {'next_token': {}, 'generate': {}} is not a readout; "
            f"give one of {READOUTS}, for example generate: {{}}"
        )
    ],
    "readout:\n  generate:\n    max-new-tokens: 3\n    stop: 5": [
        (
            "line 6: readout.generate.max-new-tokens: is not a field here. Did you mean 'max_new_tokens'? "
            "Allowed: max_new_tokens, stop, temperature, seed, relevancy."
        ),
        "line 7: readout.generate.stop: input should be a valid string; given 5",
    ],
    "readout: {generate: {temperature: .inf}}": [
        "line 4: readout.generate.temperature: input should be a finite number; given inf"
    ],
    "readout: choices": ["line 4: readout.choices.continuations: is required and was not given"],
    "metrics: rouge_l": ["line 4: metrics: should be a list; given 'rouge_l'"],
    "metrics: [precision_at_1]": [
        "line 4: metrics.0: precision_at_1 needs readout.next_token.reference, for example reference: source"
    ],
    "metrics:\n- rouge_l: {reference: d}\nreadout: {next_token: {reference: [' a']}}": [
        "line 5: metrics.0: rouge_l reads generate, and the readout is next_token"
    ],
    "readout: generate\nmetrics:\n- contains: {ref: d}\n- contins": [
        "line 6: metrics.0: contains is written {contains: {reference: COLUMN}}; given {'ref': 'd'}",
        f"line 7: metrics.1: 'contins' is not a known metric. Did you mean 'contains'? {METRICS}",
    ],
    "readout: generate\nmetrics: [rouge_l: {reference: d}, rouge_l: {reference: e}]": [
        "line 5: metrics: names rouge_l twice; each makes one column or kind of cell, so name it once"
    ],
    "controls: [unpatched, randm]": [
        (
            "line 4: controls.1: 'randm' is not allowed here. "
            "Did you mean 'random'? Allowed: unpatched, random, shuffled, text-only."
        )
    ],
    "controls: [random, random]": [
        "line 4: controls: names random twice; each makes one column or kind of cell, so name it once"
    ],
    "data: contexts": ["line 4: data: should be a mapping of fields; given 'contexts'"],
    "data:\n  builtin: contxts": [
        (
            "line 5: data.builtin: 'contxts' is not builtin data. "
            "Did you mean 'contexts'? "
            "Allowed: attributes, contexts, directions, entities, facts, texts, topics, two-hop, words."
        )
    ],
    "data:\n  file: a\n  hub: b": [
        (
            "line 4: data: names file and hub; give exactly one of builtin, file, hub, rows, reader, "
            "function, for example {builtin: contexts}"
        )
    ],
    "data:\n  rows:\n  - {a: 1}\n  - 5": ["line 7: data.rows.1: should be a mapping; given 5"],
    "data: {rows: [{1: a}]}": [
        'line 4: data.rows.0: a key must be a text; put it in quotes, for example "1"'
    ],
    "name: c": ["line 4: name: is given twice, first on line 1; keep one"],
}

#: Whole files -> their problems.
FILES = {
    "": [f"line 1: holds nothing; {BEGIN}"],
    "# a comment\n": [f"line 1: holds nothing; {BEGIN}"],
    "- a\n": [f"line 1: holds a list; {BEGIN}"],
    "a text\n": [f"line 1: holds a text; {BEGIN}"],
    "true\n": [f"line 1: holds a boolean; {BEGIN}"],
    "null\n": [f"line 1: holds nothing; {BEGIN}"],
    "# a comment\nname: A b\n": [
        (
            "line 2: name: 'A b' is not a valid recipe name; use lower-case letters and digits, with single "
            "hyphens between words: my-recipe"
        ),
        "line 2: source: is required and was not given",
    ],
    "name: a\ntitle: b\nsource:\n  layer: 1\n": [
        "line 3: source: should have either a prompt or a vector from a file",
    ],
    "name: a\ntitle: b\nsource:\n  layer: 1:x\n": [
        f"line 4: source.layer: '1:x' is not a valid layer; {LAYERS}",
    ],
    "name: a\nsource: {prompt: {{x}}}\n": [
        (
            "line 2: source.prompt: a key must be a text; put it in quotes, "
            'for example "{entity}" for a text with braces'
        )
    ],
    "a: &x [*x]\n": ["line 1: cannot be read as YAML: found unconstructable recursive node."],
    "\na: !!int b\n": [
        "line 1: contains a scalar that does not fit its tag: invalid literal for int() with base 10: 'b'"
    ],
    "a: !!python/name:os.system\n": [
        (
            "line 1: cannot be read as YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'."
        )
    ],
    "a: 1\n---\nb: 2\n": [
        (
            "line 2: cannot be read as YAML: expected a single document in the stream but found another "
            "document. Check the indentation, and quote texts that hold ': ' or begin with a mark."
        )
    ],
    "a: " + "[" * 900 + "]" * 900: ["line 1: is nested too deeply"],
}


def check(path, expected, **changes):
    with pytest.raises(SpecError) as caught:
        load_recipe(path, **changes)
    assert [str(problem) for problem in caught.value.problems] == expected
    if len(expected) == 1:
        assert str(caught.value) == f"{path}: {expected[0]}"
    else:
        listed = "".join(f"\n  {one}" for one in expected)
        assert str(caught.value) == f"{path}: {len(expected)} problems{listed}"
    return caught.value


@pytest.mark.parametrize("text", FIELDS)
def test_a_wrong_field(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"{GOOD}{text}\n")
    assert check(path, FIELDS[text]).problems == tuple(lint(path))


@pytest.mark.parametrize("text", FILES)
def test_a_wrong_file(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert check(path, FILES[text]).problems == tuple(lint(path))


# What stands after the colon is libyaml's own, or PyYAML's where it was built without.
@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [b\nc: d\n", 2), ("a: 1\n\tb: 2\n", 2), ("a: b: c\n", 1), ("a: é\nb: \x07\n", 2), ("a: *b\n", 1)],
)
def test_a_syntax_error_has_its_line(text, line, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    (problem,) = lint(path)
    assert problem.line == line
    assert problem.message.startswith("cannot be read as YAML: ")
    assert problem.message.endswith(
        ". Check the indentation, and quote texts that hold ': ' or begin with a mark."
    )


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        textwrap.dedent("""\
            # A comment.
            name: a
            titel: b
            source:
              prompt: "{entity}"
              posn: -1
              layer: 5:10
              site: mpl
            readout:
              generate: {max_new_tokens: "5"}
            metrics: [contins]
            controls: [random, shufled]
            name: b
        """)
    )
    expected = [
        f"line 3: titel: is not a field here. Did you mean 'title'? {TOP}",
        (
            "line 6: source.posn: is not a field here. "
            "Did you mean 'position'? Allowed: prompt, position, layer, site, model, mean, minus, vector."
        ),
        (
            "line 8: source.site: 'mpl' is not allowed here. "
            "Did you mean 'mlp'? Allowed: residual, before, attention, mlp."
        ),
        "line 10: readout.generate.max_new_tokens: input should be a valid integer; given '5'",
        f"line 11: metrics.0: 'contins' is not a known metric. Did you mean 'contains'? {METRICS}",
        (
            "line 12: controls.1: 'shufled' is not allowed here. "
            "Did you mean 'shuffled'? Allowed: unpatched, random, shuffled, text-only."
        ),
        "line 13: name: is given twice, first on line 2; keep one",
    ]
    check(path, expected)


#: A `--set` on GOOD with `readout: generate` and one metric -> its problems.
SETS = {
    "sorce.layer=2": [f"sorce: is not a field here. Did you mean 'source'? {TOP} (from --set sorce.layer=2)"],
    "source.layr=2": [
        (
            "source.layr: is not a field here. Did you mean 'layer'? "
            "Allowed: prompt, position, layer, site, model, mean, minus, vector. (from --set source.layr=2)"
        )
    ],
    "source.layer=zz": [f"source.layer: 'zz' is not a valid layer; {LAYERS} (from --set source.layer=zz)"],
    "source.prompt={x}": [
        (
            f"source.prompt: {{'x': None}} is not a valid prompt; {PROMPTS}. "
            'Quote a text that begins with a brace: "{column}" (from --set source.prompt={x})'
        )
    ],
    "readout.next_token.top_k=2": [
        (
            "readout.next_token.top_k: readout is generate here; set readout=next_token first, "
            "or readout.generate.FIELD (from --set readout.next_token.top_k=2)"
        )
    ],
    "readout.generate.stp=2": [
        (
            "readout.generate.stp: is not a field here. Did you mean 'stop'? "
            "Allowed: max_new_tokens, stop, temperature, seed, relevancy. (from --set readout.generate.stp=2)"
        )
    ],
    "metrics.0.contains.reference=e": [
        (
            "metrics.0.contains.reference: metrics.0 is rouge_l here; set metrics.0=contains first, "
            "or metrics.0.rouge_l.FIELD (from --set metrics.0.contains.reference=e)"
        )
    ],
    "metrics.1=contains": [
        "metrics.1: metrics is a list; name an item by its number: 0..0 (from --set metrics.1=contains)"
    ],
    "readout=next_token": ["line 6: metrics.0: rouge_l reads generate, and the readout is next_token"],
    "layer 5": [
        "--set layer 5: is not an assignment; write --set key.path=value, for example --set source.layer=5"
    ],
    "source..layer=5": [
        (
            "--set source..layer=5: is not an assignment; write --set key.path=value, "
            "for example --set source.layer=5"
        )
    ],
    "seed={a: 1, a: 2}": ["--set seed={a: 1, a: 2}: the value is given twice, first on line 1; keep one"],
}


@pytest.mark.parametrize("text", SETS)
def test_a_wrong_set(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"{GOOD}readout: generate\nmetrics:\n- rouge_l: {{reference: d}}\n")
    check(path, SETS[text], sets=[text])


def test_a_wrong_override(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    expected = ["source.model: input should be a valid string; given 5 (from source.model=5)"]
    check(path, expected, overrides={"source.model": 5})


SHIPPED = f"Allowed: {', '.join(shipped())}."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "next-tokn",
            (
                f"'next-tokn' is not a recipe. Did you mean 'next-token'? {SHIPPED} "
                "Or give a file: my-recipe.yaml."
            ),
        ),
        ("zzz", f"'zzz' is not a recipe. {SHIPPED} Or give a file: my-recipe.yaml."),
        ("zzz.yaml", "the recipe 'zzz.yaml' does not exist. Check the path."),
        ("a/b", "the recipe 'a/b' does not exist. Check the path."),
        (
            "next_token.yml",
            "the recipe 'next_token.yml' does not exist. Did you mean the recipe that ships as 'next-token'?",
        ),
        ("a\0b.yaml", "the recipe 'a\\x00b.yaml' does not exist. Check the path."),
        ("x" * 300, f"the recipe '{'x' * 80}...' cannot be found: File name too long. Check the path."),
    ],
)
def test_a_recipe_that_is_not_there(name, message):
    with pytest.raises(InputError) as caught:
        load_recipe(name)
    assert str(caught.value) == message
    assert [str(problem) for problem in lint(name)] == [message]


def test_a_recipe_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    for path, message in (
        (tmp_path, f"the recipe '{tmp_path}' cannot be read: Is a directory. Check the file."),
        (tmp_path / "latin.yaml", f"the recipe '{tmp_path}/latin.yaml' is not UTF-8 text. Save it as UTF-8."),
    ):
        with pytest.raises(InputError) as caught:
            load_recipe(path)
        assert str(caught.value) == message
        assert [str(problem) for problem in lint(path)] == [message]


NO_COLUMN = "which the data does not have."
NO_DATA = "The recipe has no data; add some, for example data: {builtin: contexts}."
#: What `lint` alone finds, in recipes that load.
COLUMNS = {
    'source: {prompt: "{city} {{braces}}"}': [
        f"line 3: source.prompt: asks for the column 'city', {NO_COLUMN} {NO_DATA}"
    ],
    'data: {builtin: entities}\nsource:\n  prompt: "{entty}"\ntarget:\n  prompt: "{zz} x"': [
        (
            f"line 5: source.prompt: asks for the column 'entty', {NO_COLUMN} "
            "Did you mean 'entity'? Allowed: entity, description, kind."
        ),
        f"line 7: target.prompt: asks for the column 'zz', {NO_COLUMN} Allowed: entity, description, kind.",
    ],
    'data: {rows: [{a: 1}]}\nsource: {prompt: [{role: user, content: "{b}"}]}': [
        f"line 4: source.prompt: asks for the column 'b', {NO_COLUMN} Allowed: a."
    ],
    "data: {file: rows.csv}\nsource: {prompt: x}\nreadout: generate\nmetrics:\n- rouge_l:\n"
    "    reference: answr": [
        (
            f"line 8: metrics.0.rouge_l.reference: asks for the column 'answr', {NO_COLUMN} "
            "Did you mean 'answer'? Allowed: question, answer."
        )
    ],
    'data: {rows: [{a: 1}]}\nsource: {prompt: x}\nreadout:\n  choices:\n    continuations:\n    - "{a}"\n'
    '    - "{b}"': [
        f"line 9: readout.choices.continuations.1: asks for the column 'b', {NO_COLUMN} Allowed: a."
    ],
    'data: {rows: [{a: 1}]}\nsource: {prompt: x}\nreadout: {next_token: {reference: "{b}"}}': [
        f"line 5: readout.next_token.reference.0: asks for the column 'b', {NO_COLUMN} Allowed: a."
    ],
    "source: {prompt: x}\ndata:\n  file: rows.txt": [
        (
            "line 5: data.file: data.file='rows.txt' has .txt, which is not read. "
            "Did you mean '.tsv'? Allowed: .jsonl, .json, .csv, .tsv, .parquet."
        )
    ],
    "source: {prompt: x}\ndata:\n  rows: [{a: 1}, {b: 1}]": [
        (
            "line 5: data.rows: data.rows, row 2: the columns are b; those of the first row are a. "
            "Give every row the same columns."
        )
    ],
    'source: {prompt: "{a}"}\ndata: {hub: org/name, split: test}': [],
}


@pytest.mark.parametrize("text", COLUMNS)
def test_a_column_that_is_missing(text, tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\nq,a\n")
    path = tmp_path / "r.yaml"
    path.write_text(f"name: a\ntitle: b\n{text}\n")
    load_recipe(path)
    assert [str(problem) for problem in lint(path)] == COLUMNS[text]
