"""Every cell of one model type, by the package and by the reference."""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import registry
import registry_sizes
import tiny
import torch
from plain import Plain

import patchscope_nn as ps
from patchscope_nn.errors import InputError

N_LAYERS = registry_sizes.N_LAYERS
#: The first target is shorter than every window and threshold of the configs, the second longer than all.
ROWS = (
    {"s": "The Eiffel", "t": "of x->"},
    {
        "s": "The Eiffel Tower is in the city of Paris, and tall",
        "t": "Diana->Diana; Paris->Paris; the city of x->",
    },
)
PLACES = (-1, -2)
CONTINUATIONS = (" Paris is", " Diana in the city")
#: Decoding crosses a window, and behind the first target the threshold.
N_NEW = registry_sizes.THRESHOLD - registry_sizes.WINDOW + 2
TOP_K = 3
TOLERANCE = 1e-3
#: Probabilities of decoded tokens: the reference reads everything again, where a model decodes by a recurrent
#: state. Zamba 2 itself rounds so differently in the two that they differ by 7e-4 after 8 tokens.
ROUNDED = 5e-3
READOUTS = {
    "next_token": ps.NextToken(top_k=TOP_K),
    "generate": ps.Generate(max_new_tokens=N_NEW, relevancy=True),
    "choices": ps.Choices(list(CONTINUATIONS)),
}
#: With few cells of one source, source and target run in one forward where the model allows that.
FUSED = {"next_token": READOUTS["next_token"], "generate": ps.Generate(max_new_tokens=N_NEW)}
PAIRS = [(layer, target) for layer in range(N_LAYERS) for target in range(N_LAYERS)]


class Verdict(NamedTuple):
    """What became of a model type: ok, refused, wrong, raises, fault (of the builder)."""

    kind: str
    detail: str = ""


def check(model_type, **options):
    """Run every cell of a model type, with options of `ps.run`, and compare it with the reference."""
    module = registry.build(model_type)
    original = copy.deepcopy(module)
    try:
        model = ps.load(module, tokenizer=tiny.TOKENIZER)
        runs = {name: (name, _run(model, readout, **options)) for name, readout in READOUTS.items()}
        for name, readout in FUSED.items():
            runs[f"fused {name}"] = name, _run_few(model, readout, **options)
    except InputError as error:
        return Verdict("refused", str(error))
    plain = Plain(original, n_layers=N_LAYERS, rereads=model_type not in registry.PREFIXES)
    if plain.rereads and plain.looks_ahead(_ids(ROWS[0]["t"])):
        return Verdict("wrong", "tokens see those after them, and it is run all the same")
    reference = functools.cache(functools.partial(_expected, plain))
    detail = []
    for title, (name, rows) in runs.items():
        cells = _wrong(name, rows, reference)
        detail += [f"{title} {len(cells)} of {len(rows)} ({cells[0]})"] if cells else []
    return Verdict("wrong" if detail else "ok", "; ".join(detail))


def _run(model, readout, **options):
    scope = ps.Patchscope(
        source=ps.Source(prompt="{s}", position=-1, layer="all"),
        target=ps.Target(prompt="{t}", position={"each": list(PLACES)}, layer="all"),
        readout=readout,
    )
    rows = ps.run(scope, model=model, data=[dict(row) for row in ROWS], **options).rows
    assert len(rows) == len(ROWS) * len(PLACES) * len(PAIRS)
    return rows


def _run_few(model, readout, **options):
    scope = ps.Patchscope(
        source=ps.Source(prompt="{s}", position=-1, layer=1),
        target=ps.Target(prompt="{t}", position=-1, layer=[1, 3]),
        readout=readout,
    )
    rows = []
    for number, row in enumerate(ROWS):
        rows += [{**cell, "row": number} for cell in ps.run(scope, model=model, data=[row], **options).rows]
    return rows


def _wrong(name, rows, reference):
    """The cells that differ, each in words."""
    compare = {"next_token": _next_token, "generate": _text, "choices": _choices}[name]
    wrong = []
    for row in rows:
        length = len(_ids(ROWS[row["row"]]["t"]))
        (place,) = (where - length for where in row["target_position"])
        expected = reference(name, row["row"], place)[row["source_layer"], row["target_layer"]]
        problem = compare(row, expected)
        if problem:
            where = f"row {row['row']}, {row['source_layer']} -> {row['target_layer']} at {place}"
            wrong.append(f"{where}: {problem}")
    return wrong


def _next_token(row, logits):
    probs = logits.softmax(-1)
    best = probs.topk(TOP_K)
    far = (torch.tensor(row["top_probs"]).log() - best.values.log()).abs().max()
    if not far <= TOLERANCE:
        return f"top_probs {row['top_probs']}, expected {best.values.tolist()}"
    if row["top_ids"][0] != best.indices[0] and best.values[0] - best.values[1] >= TOLERANCE:
        return f"top_ids {row['top_ids']}, expected {best.indices.tolist()}"
    return None


def _text(row, expected):
    tokens, margins, patched, unpatched = expected
    text = tiny.TOKENIZER.decode(tokens)
    if row["text"] == text:
        both = (("token_probs", patched, ROUNDED), ("unpatched_token_probs", unpatched, TOLERANCE))
        for name, probs, tolerance in both:
            given = row.get(name, probs)
            far = (torch.tensor(given) - torch.tensor(probs)).abs() if len(given) == len(probs) else None
            if far is None or far.gt(tolerance).any():
                return f"{name} {given}, expected {probs}"
        return None
    tie = next((step for step, margin in enumerate(margins) if margin < TOLERANCE), None)
    if tie is not None and row["text"].startswith(tiny.TOKENIZER.decode(tokens[:tie])):
        return None
    return f"text {row['text']!r}, expected {text!r}"


def _choices(row, expected):
    given = torch.tensor(row["choice_logprobs"])
    if not (given - expected).abs().max() <= TOLERANCE:
        return f"choice_logprobs {row['choice_logprobs']}, expected {expected.tolist()}"
    return None


def _ids(text):
    return tiny.TOKENIZER(text, add_special_tokens=False).input_ids


def _expected(plain, name, row, place):
    """What a readout of a data row is for each pair of layers; `place` is counted from the prompt's end."""
    prompt = _ids(ROWS[row]["t"])
    states = plain.states(_ids(ROWS[row]["s"]))[[layer for layer, _ in PAIRS]]
    put = {"place": place, "layers": [target for _, target in PAIRS], "states": states}

    def follows(tokens):
        logits = plain.follows(prompt, tokens, **put)
        if not logits.isfinite().all():
            raise FloatingPointError("the reference's logits are not finite")
        return logits

    values = {"next_token": _logits, "generate": _greedy, "choices": _scores}[name](follows)
    if name == "generate":
        unpatched = functools.cache(functools.partial(_unpatched, plain, tuple(prompt)))
        values = [(*cell, unpatched(tuple(cell[0]))) for cell in values]
    return dict(zip(PAIRS, values, strict=True))


def _logits(follows):
    return follows([[]] * len(PAIRS))[:, -1]


def _greedy(follows):
    texts, margins, probs = ([[] for _ in PAIRS] for _ in range(3))
    for _ in range(N_NEW):
        best = follows(texts)[:, -1].softmax(-1).topk(2)
        for place, (tokens, (first, second)) in enumerate(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ):
            texts[place].append(tokens[0])
            margins[place].append(first - second)
            probs[place].append(first)
    ends = [ids.index(tiny.EOS_ID) if tiny.EOS_ID in ids else N_NEW for ids in texts]
    cells = zip(texts, margins, probs, ends, strict=True)
    return [(ids[:end], margin, likely[:end]) for ids, margin, likely, end in cells]


def _unpatched(plain, prompt, tokens):
    """How likely each token is after the prompt as it is."""
    if not tokens:
        return []
    nowhere = {"place": -1, "layers": [-1], "states": torch.zeros(1, 1)}
    logits = plain.follows([*prompt], [[*tokens[:-1]]], **nowhere)[0]
    return logits.softmax(-1)[range(len(tokens)), [*tokens]].tolist()


def _scores(follows):
    scores = []
    for continuation in map(_ids, CONTINUATIONS):
        logprobs = follows([continuation] * len(PAIRS))[:, :-1].log_softmax(-1)
        tokens = torch.tensor(continuation).expand(len(PAIRS), -1)
        scores.append(logprobs.gather(-1, tokens[..., None]).sum((1, 2)))
    return list(torch.stack(scores, -1))
