"""Bad input at the command line: the field, what was given, what is allowed, what to do; and nothing else.

The texts stand here whole. `run` and `plan` say the same, because both prepare before they begin.
"""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file

from patchscope_nn import cli

#: nnsight says so of a BERT, before we refuse it.
pytestmark = pytest.mark.filterwarnings("ignore:Module .* has a submodule named 'output':UserWarning")

RECIPE = """\
name: tiny
title: What comes next?
model: model
data: {rows: [{text: The Eiffel Tower}, {text: the city of Paris}]}
source: {prompt: "{text}"}
target: {prompt: "The city -> "}
readout: {next_token: {top_k: 2, reference: source}}
metrics: [precision_at_1]
controls: [unpatched, random]
"""
SOURCE = "this 5-token prompt (0 'The', 1 ' E', 2 'iff', 3 'el', 4 ' Tower')"
TARGET = "this 5-token prompt (0 'The', 1 ' city', 2 ' ', 3 '->', 4 ' ')"
BLOCKS = "outside this model, whose 4 blocks are 0..3 (or -4..-1 from the end)"
POSITION = "Use an index (-1 is the last token), or a text that ends where a token ends."
EMBED = "Use 'embed' for the input of block 0."

#: The options that are wrong -> the message, and the hint.
BAD = {
    "an unknown field": (
        ["--set", "source.layers=3"],
        (
            "tiny.yaml: source.layers: is not a field here. Did you mean 'layer'? "
            "Allowed: prompt, position, layer, site, model, mean, minus, vector. (from --set source.layers=3)"
        ),
        "",
    ),
    "a wrong type": (
        ["--set", "readout.next_token.top_k=many"],
        (
            "tiny.yaml: readout.next_token.top_k: input should be a valid integer; given 'many' "
            "(from --set readout.next_token.top_k=many)"
        ),
        "",
    ),
    "a layer beyond the last": (["--set", "source.layer=4"], f"source.layer=4 is {BLOCKS}.", EMBED),
    "a layer before the first": (["--set", "target.layer=-5"], f"target.layer=-5 is {BLOCKS}.", EMBED),
    "a range of no layers": (
        ["--set", "source.layer=7:9"],
        "source.layer='7:9' holds no layer of this model, whose blocks are 0..3.",
        "A range excludes its stop, as in Python: '0:10' is layers 0 to 9.",
    ),
    "a position outside": (
        ["--set", "source.position=9"],
        f"data row 0: source.position=9 is outside {SOURCE}.",
        POSITION,
    ),
    "a span outside": (
        ["--set", "source.position={start: 3, end: 9}"],
        f"data row 0: source.position=[3, 9) is not a span inside {SOURCE}.",
        POSITION,
    ),
    "a text that is absent": (
        ["--set", "target.position=Rome"],
        f"data row 0: target.position='Rome' does not occur in {TARGET}.",
        POSITION,
    ),
    "a text that splits no token": (
        ["--set", "target.position=cit"],
        f"data row 0: target.position='cit' does not end with a whole token of {TARGET}.",
        POSITION,
    ),
    "a mapping of the wrong shape": (
        ["--set", "mapping={affine: wrong.safetensors}"],
        (
            "mapping affine:wrong.safetensors fails on states of shape (2, 32): "
            "mat1 and mat2 shapes cannot be multiplied (2x32 and 16x8)."
        ),
        "It should map (n, 32) to (n, 32).",
    ),
    "no rows": (
        ["--set", "data={rows: []}"],
        (
            "tiny.yaml: data.rows: is an empty list; give at least one row, for example [{entity: Paris}] "
            "(from --set data={rows: []})"
        ),
        "",
    ),
    "an empty file": (
        ["--set", "data={file: empty.jsonl}"],
        "data.file='empty.jsonl' holds no row.",
        "Give data with at least one row.",
    ),
    "a missing column": (
        ["--set", "source.prompt='{txt}'"],
        "data row 0: source.prompt asks for the column 'txt', which the data does not have.",
        "Did you mean 'text'? Allowed: text. Write {{ and }} for braces that are text.",
    ),
    "a metric's missing column": (
        ["--set", "readout={generate: {}}", "--set", "metrics=[rouge_l: {reference: answer}]"],
        "metrics.rouge_l.reference='answer' is not a column of data row 0.",
        (
            "A metric's parameter names a column of the data. Allowed: text. A text that is the same for "
            "every row must be a column, too: data: {rows: [{reference: answer}]}, and rouge_l: "
            "{reference: reference}."
        ),
    ),
    "a file that is not there": (
        ["--set", "data={file: none.jsonl}"],
        "data.file='none.jsonl' does not exist; looked for none.jsonl.",
        "Check data.file.",
    ),
    "a file that is no text": (
        ["--set", "data={file: latin.csv}"],
        "data.file='latin.csv' is not UTF-8 text.",
        "Save the file as UTF-8.",
    ),
    "a file that is not JSON": (
        ["--set", "data={file: bad.jsonl}"],
        (
            "data.file='bad.jsonl', line 2, column 2: is not JSON "
            "(Expecting property name enclosed in double quotes)."
        ),
        "Correct that line.",
    ),
    "an unknown dtype": (
        ["--dtype", "float23"],
        "dtype='float23' is not a valid dtype.",
        "Did you mean 'float32'? Allowed: auto, float32, bfloat16, float16, float64.",
    ),
    "an encoder-decoder": (
        ["--model", "t5"],
        "'t5' (t5) is an encoder-decoder; a Patchscope needs a decoder.",
        "Use a causal language model, for example one of the Llama, GPT-2, Qwen or Gemma families.",
    ),
    "an encoder": (
        ["--model", "bert"],
        "'bert' (BertLMHeadModel) is an encoder: its tokens attend to later tokens.",
        "Use a causal language model.",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("messages")
    llama = tiny.make_module("llama")
    llama.config.max_position_embeddings = 512  # the description prompt is long in so small a vocabulary
    torch.manual_seed(0)  # of weights that are too small by chance, no token would see another
    common = {"vocab_size": tiny.VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 32, "hidden_size": 32}
    common |= {"num_layers": 2, "num_heads": 4, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, model in {
        "model": llama,
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**common, intermediate_size=32)),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(**common)),
    }.items():
        model.save_pretrained(here / name)
        tiny.TOKENIZER.save_pretrained(here / name)
    save_file({"weight": torch.zeros(8, 16)}, here / "wrong.safetensors")
    (here / "empty.jsonl").write_text("")
    (here / "bad.jsonl").write_text('{"text": "a"}\n{nope\n')
    (here / "latin.csv").write_bytes(b"text\n\xe9\n")
    (here / "tiny.yaml").write_text(RECIPE)
    return here


@pytest.fixture
def patchscope(folder, monkeypatch, capsys):
    """Call a command that must fail: what it printed on stdout and stderr."""
    monkeypatch.chdir(folder)

    def call(*words):
        before = set(folder.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["patchscope", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert set(folder.rglob("*")) == before, "bad input wrote something"
        return capsys.readouterr()

    return call


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, command, patchscope):
    words, message, hint = BAD[name]
    printed = patchscope(command, "tiny.yaml", *words)
    assert printed.out == ""
    said = printed.err[printed.err.index("error: ") :]  # transformers may warn of a model before we refuse it
    assert said == f"error: {message}\n" + (f"  hint: {hint}\n" if hint else "")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_as_json(name, patchscope):
    words, message, hint = BAD[name]
    said = json.loads(patchscope("run", "tiny.yaml", *words, "--json").out)
    assert (said["error"], said["hint"]) == (message, hint)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--layer", "9"], f"source.layer=9 is {BLOCKS}.", EMBED),
        (["--target-layer", "9"], f"target.layer=9 is {BLOCKS}.", EMBED),
        (
            ["--position", "Rome"],
            "source.position='Rome' does not occur in this 2-token prompt (0 'The', 1 ' city').",
            POSITION,
        ),
    ],
)
def test_bad_input_to_explain(words, message, hint, patchscope):
    printed = patchscope("explain", "The city", "--model", "model", *words)
    assert printed.out == ""
    assert printed.err == f"error: {message}\n  hint: {hint}\n"
