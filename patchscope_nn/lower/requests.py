"""Turns a step into requests to an engine that batches requests by itself, and their answers into results.

Each prompt is a request. Source prompts come first, because target requests carry the states that they read.
Mappings are applied here: their weights would travel with every request.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, TypeAlias

import torch

from patchscope_nn.body.program import Results, SourceProgram, StepProgram, Write
from patchscope_nn.body.readouts import read_choices, read_generate
from patchscope_nn.body.requests import RequestProgram
from patchscope_nn.body.states import in_rows, in_sums, in_together
from patchscope_nn.lower.mapping import map_states

#: The sampling options of every request: one token, the likeliest, which is not turned into text.
_SAMPLING = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True, "detokenize": False}
#: The fields of a pass that a request needs besides its readout.
_FIELDS = ("cells", "embedded", "every_step")

Answer: TypeAlias = dict[str, Any]
#: Yields one or more requests, receives their answers in the same order, and returns the results of a step.
Exchange: TypeAlias = Generator[list[RequestProgram], list[Answer], Results]


def exchange(program: StepProgram) -> Exchange:
    """Run a step as an exchange of requests and answers.

    Args:
        program: The step; each of its target passes has one cell, in one row.
    """
    hidden, finals = ([] if part is None else [part] for part in (program["given"], program["given_finals"]))
    for source in program["sources"]:
        readings = [*_readings(source, program)]
        answers = (yield readings) if readings else []
        hidden += _states(source, answers)
        finals += _finals(source, answers)
    table, distributions = in_together(hidden), in_together(finals)
    if table is not None:
        table = in_sums(table, program["sums"])
    mapped = map_states(program, table)
    requests = [[*_patchings(mapped, target, distributions)] for target in mapped["targets"]]
    answers = (yield [request for of_cell in requests for request in of_cell]) if requests else []
    in_order = iter(answers)
    passes = [_columns([next(in_order) for _ in of_cell]) for of_cell in requests]
    compared = [number for number, target in enumerate(mapped["targets"]) if _compares(target)]
    if compared:
        answers = yield [_unpatched(mapped, number, passes[number]) for number in compared]
        for number, answer in zip(compared, answers, strict=True):
            passes[number]["unpatched_token_probs"] = [torch.tensor(answer["scores"]).exp().tolist()]
    return {
        "passes": passes,
        "kept": in_rows(table, program["keep"]),
        "kept_finals": in_rows(distributions, program["keep_finals"]),
        "prefix": None,
    }


def _readings(source: SourceProgram, program: StepProgram) -> Iterator[RequestProgram]:
    """Yield a request for the states of each source prompt, and one for each of its distributions.

    An engine computes logits only after the last token of a prompt, so a distribution is read after the
    prompt up to its position. No token attends to later ones.
    """
    rows = [*_prompts(source["inputs"])]
    for row, ids in enumerate(rows):
        width = source["inputs"]["input_ids"].shape[1]
        reads = {}
        for layer, places in source["reads"].items():
            columns = places["positions"][places["rows"] == row] - (width - len(ids))
            if len(columns):
                reads[layer] = columns.tolist()
        if reads:
            yield _reading(ids, program, reads=reads)
    if source["finals"] is not None:
        places = source["finals"]
        for row, position in zip(places["rows"].tolist(), places["positions"].tolist(), strict=True):
            yield _reading(rows[row][: len(rows[row]) + position + 1], program, final=True)


def _reading(
    ids: list[int],
    program: StepProgram,
    *,
    reads: dict[int, list[int]] | None = None,
    final: bool = False,
    scored: int = 0,
) -> RequestProgram:
    return {
        "ids": ids,
        "sampling": {**_SAMPLING, **({"prompt_logprobs": 0} if scored else {})},
        "site": program["source_site"],
        "reading": {"reads": reads or {}, "final": final, "scored": scored},
        "patching": None,
    }


def _states(source: SourceProgram, answers: list[Answer]) -> list[torch.Tensor]:
    """Return the states of a source pass in the order of its program: by layer, then as its places."""
    together = []
    of_row = {row: answer["states"] for row, answer in zip(_read_rows(source), answers, strict=False)}
    for layer, places in source["reads"].items():
        rows = places["rows"]
        states: Any = None
        for row, by_layer in of_row.items():
            at = (rows == row).nonzero()[:, 0]
            if len(at):
                read = by_layer[layer]
                states = read.new_empty(len(rows), read.shape[1]) if states is None else states
                states[at] = read
        together.append(states)
    return together


def _read_rows(source: SourceProgram) -> list[int]:
    """Return the rows of a source pass from which states are read, in ascending order."""
    return sorted({row for places in source["reads"].values() for row in places["rows"].tolist()})


def _finals(source: SourceProgram, answers: list[Answer]) -> list[torch.Tensor]:
    if source["finals"] is None:
        return []
    return [torch.cat([answer["final"] for answer in answers[len(_read_rows(source)) :]])]


def _prompts(inputs: dict[str, torch.Tensor]) -> Iterator[list[int]]:
    """Yield the ids of each row of a padded batch, without padding."""
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        yield ids[mask.bool()].tolist()


def _patchings(program: StepProgram, target: Any, finals: torch.Tensor | None) -> Iterator[RequestProgram]:
    """Yield the requests of a cell: one, or one for each of its choices."""
    (ids,) = _prompts(target["inputs"])
    readout: dict[str, Any] = {**target["readout"], "mask": None}
    asked: dict[str, Any] = readout["asked"]
    kind = readout["read"]
    decoding, scored = "", [[]]  # type: tuple[str, list[list[int]]]
    sampling: dict[str, Any] = {}
    if kind is read_choices:
        decoding, scored = "score", asked["continuations"][0]
        sampling = {"prompt_logprobs": 0}
    elif kind is read_generate:
        decoding = "steps" if target["every_step"] or asked["temperature"] > 0 else "text"
        ends = [*readout["eos"], *asked["stops"]]
        sampling = {"max_tokens": asked["max_new_tokens"], "stop_token_ids": ends}
        sampling |= {"logprobs": 0} if decoding == "text" else {}
    else:
        ids = ids[: len(ids) + int(target["positions"][0]) + 1]
    if decoding in ("text", "score"):
        readout["read"] = None
    distribution = None
    if readout["compared"] is not None and finals is not None:
        distribution = finals[readout["compared"]]
        readout["asked"] = {
            name: torch.zeros_like(value) if value is readout["compared"] else value
            for name, value in asked.items()
        }
    readout["compared"] = None
    writes, states = _own_states(target["writes"], program["given"], n_tokens=len(ids))
    for continuation in scored:
        yield {
            "ids": [*ids, *continuation],
            "sampling": {**_SAMPLING, **sampling},
            "site": program["target_site"],
            "reading": None,
            "patching": {
                "target": {**{name: target[name] for name in _FIELDS}, "writes": writes, "readout": readout},
                "states": states,
                "finals": distribution,
                "soft": program["soft"] if target["embedded"] else None,
                "writing": program["writing"],
                "decoding": decoding,
                "scored": len(continuation),
            },
        }


def _own_states(
    writes: dict[int, Write], table: torch.Tensor | None, *, n_tokens: int
) -> tuple[dict[int, Write], torch.Tensor | None]:
    """Return the writes of a cell within its first tokens, and the states that they refer to."""
    kept = {layer: _kept(write, write["positions"] < n_tokens) for layer, write in writes.items()}
    numbers: list[Any] = [write["states"] for write in kept.values() if write["states"] is not None]
    if table is None or not numbers:
        return kept, None
    rows, places = torch.cat(numbers).unique(return_inverse=True)
    place = iter(places.split([len(part) for part in numbers]))
    return {
        layer: write if write["states"] is None else {**write, "states": next(place)}
        for layer, write in kept.items()
    }, table[rows]


def _kept(write: Write, kept: torch.Tensor) -> Write:
    if kept.all():
        return write
    random: Any = write["random"]
    parts: Any = {name: part[kept] for name, part in write.items() if isinstance(part, torch.Tensor)}
    if random is not None:
        parts["random"] = {name: part[kept] for name, part in random.items()}
    return {**write, **parts}


def _columns(answers: list[Answer]) -> dict[str, Any]:
    """Return the columns of a cell from the answers to its requests."""
    first = answers[0]
    if "choice_logprobs" not in first:
        return first
    logprobs = torch.cat([answer["choice_logprobs"] for answer in answers], dim=1)
    columns = {"choice_logprobs": logprobs, "choice_probs": torch.softmax(logprobs, dim=-1)}
    reasons = [answer["not_finite"][0] for answer in answers if "not_finite" in answer]
    return columns | ({"not_finite": reasons[:1]} if reasons else {})


def _compares(target: Any) -> bool:
    """Return whether a text's probabilities without the patch are needed."""
    return bool(target["readout"]["asked"].get("prompts"))


def _unpatched(program: StepProgram, number: int, columns: dict[str, Any]) -> RequestProgram:
    """Return the request that scores a decoded text after the unpatched T."""
    target: Any = program["targets"][number]
    ids = columns["token_ids"][0]
    prompt = target["readout"]["asked"]["prompts"][0]
    return _reading([*prompt, *ids], program, scored=len(ids))
