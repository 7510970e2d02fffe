"""Runs one request of an engine that batches requests by itself (vLLM), inside its context.

A request holds the tokens of one prompt, without padding: states are (n_tokens, d_model). An engine's block
may return its states as several tensors, which the next block adds: a read adds them too, and a write
replaces the first and clears the others. Nothing is returned that an engine might overwrite.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from patchscope_nn.body.batch import in_last
from patchscope_nn.body.program import SitePath, Writing
from patchscope_nn.body.readouts import read_noised
from patchscope_nn.body.results import in_pending, in_readout, in_results
from patchscope_nn.body.states import in_blocks, in_embedded, in_write, in_written


class Reading(TypedDict):
    """What a request reads of a source prompt."""

    #: The positions of the hidden states to read, by layer, in ascending order of layers.
    reads: dict[int, list[int]]
    #: True if the next-token distribution after the prompt is read.
    final: bool
    #: How many tokens at the end of the prompt are scored.
    scored: int


class Patching(TypedDict):
    """What a request writes into a target prompt, and reads from it."""

    #: The pass, of one cell, without the fields that only a forward pass needs.
    target: Any
    #: The states of this cell, which its writes refer to; None for none.
    states: torch.Tensor | None
    #: The distributions that its readout refers to; None for none.
    finals: torch.Tensor | None
    #: As in `StepProgram`.
    soft: torch.Tensor | None
    writing: Writing
    #: What the readout needs of the engine. Empty: the prompt alone. `text`: a text that the engine decodes.
    #: `steps`: a text whose tokens are patched or sampled one by one. `score`: the log-probability of the
    #: last tokens of the prompt.
    decoding: str
    #: For `score`, how many tokens at the end of the prompt are scored.
    scored: int


class RequestProgram(TypedDict):
    """One request to an engine that batches requests by itself: one prompt, and what is done with it."""

    #: The ids of the prompt.
    ids: list[int]
    #: The engine's sampling options.
    sampling: dict[str, Any]
    #: Where states are read or written.
    site: SitePath
    #: What is done; one of the two is None.
    reading: Reading | None
    patching: Patching | None


def in_request(model: Any, tracer: Any, request: RequestProgram) -> dict[str, Any]:
    """Run a request, and return its results as plain values and tensors on the CPU."""
    site = request["site"]
    if request["reading"] is not None:
        return in_reading(model, tracer, request["reading"], site)
    patching: Any = request["patching"]
    columns, written = in_patching(model, tracer, patching, site)
    target = patching["target"]
    return in_results(in_pending(columns, target, written), target, patching["states"])


def in_reading(model: Any, tracer: Any, reading: Reading, site: SitePath) -> dict[str, Any]:
    """Return what is read from an unpatched prompt.

    Returns:
        `states`, by layer, each (n, d_model); `final`, the next-token log-probabilities, (1, vocab), or None;
        `scores`, the log-probability of each scored token.
    """
    states = {
        layer: in_sum(in_terms(model, site, layer))[positions].cpu()
        for layer, positions in reading["reads"].items()
    }
    final = torch.log_softmax(model.logits.float(), dim=-1).cpu() if reading["final"] else None
    scores = in_scores(tracer.result, reading["scored"]) if reading["scored"] else []
    return {"states": states, "final": final, "scores": scores}


def in_patching(
    model: Any, tracer: Any, patching: Patching, site: SitePath
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Patch a target prompt; return the columns of its readout, and what was written."""
    decoding, readout = patching["decoding"], patching["target"]["readout"]
    if decoding == "steps":
        return in_steps(model, tracer, patching, site)
    written = in_prompt_writes(model, patching, site)
    if not readout["unembeds"]:
        return in_readout(None, readout, None, None, finals=patching["finals"], written=written), written
    logits = model.logits
    if not decoding:
        return in_readout(None, readout, logits, None, finals=patching["finals"], written=written), written
    sound = logits.float().amax(-1)
    output = tracer.result
    if decoding == "score":
        summed = torch.tensor([[sum(in_scores(output, patching["scored"]))]])
        # The choices are compared once all have been scored; until then this only shows whether one is NaN.
        return {"choice_logprobs": summed, "choice_probs": torch.softmax(summed.clamp(-1e4), dim=-1)}, written
    ids = list(output.outputs[0].token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]
    return in_text(readout, ids, logprobs, sound), written


def in_scores(output: Any, count: int) -> list[float]:
    """Return the log-probability of each of the last tokens of a prompt."""
    ids, steps = output.prompt_token_ids[-count:], output.prompt_logprobs[-count:]
    return [step[token].logprob for step, token in zip(steps, ids, strict=True)]


def in_text(readout: Any, ids: list[int], logprobs: list[float], sound: torch.Tensor) -> dict[str, Any]:
    """Return the columns of a decoded text, whose last token may be one that ends it."""
    reason = "length"
    if ids and ids[-1] in readout["eos"]:
        ids, logprobs, reason = ids[:-1], logprobs[:-1], "eos"
    elif ids and ids[-1] in readout["asked"]["stops"]:
        reason = "stop"
    if any(logprob != logprob for logprob in logprobs):  # noqa: PLR0124 (NaN differs from itself)
        sound = sound * float("nan")
    columns: dict[str, Any] = {"token_ids": [ids], "stopped": [reason], "sound": sound}
    if readout["asked"]["prompts"] is not None:
        columns["token_probs"] = [torch.tensor(logprobs).exp().tolist()]
    return columns


def in_steps(
    model: Any, tracer: Any, patching: Patching, site: SitePath
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Decode a text whose steps are patched, or whose tokens are drawn with the noise of its own seed."""
    readout = patching["target"]["readout"]
    asked = readout["asked"]
    ends = {*readout["eos"], *asked["stops"]}
    noise = torch.Generator().manual_seed(asked["seeds"][0])
    written: dict[str, torch.Tensor] = {}
    ids: list[int] = []
    logprobs: list[float] = []
    sound: Any = None
    for step in tracer.iter[: asked["max_new_tokens"]]:
        if step == 0:
            written = in_prompt_writes(model, patching, site)
        elif patching["target"]["every_step"]:
            in_step_writes(model, patching, site)
        scores = logits = model.logits.float()
        sound = logits.amax(-1) if sound is None else sound + logits.amax(-1)
        if asked["temperature"] > 0:
            scores = read_noised(logits / asked["temperature"], [noise])
        token = int(scores.argmax(-1))
        model.samples = torch.full_like(model.samples, token)
        ids.append(token)
        logprobs.append(float(torch.log_softmax(logits, dim=-1)[0, token]))
        if token in ends:
            break
    return in_text(readout, ids, logprobs, sound), written


def in_prompt_writes(model: Any, patching: Patching, site: SitePath) -> dict[str, torch.Tensor]:
    """Change the embeddings and the states of a prompt; return what was written, as in `PatchedRun`."""
    target, parts = patching["target"], []
    if target["embedded"]:
        terms = in_terms(model, site, -1)
        value = in_sum(terms)[None]
        in_embedded(value, target["embedded"], patching["soft"])
        in_replaced(terms, value[0], slice(None))
    for layer, write in target["writes"].items():
        terms = in_terms(model, site, layer)
        value = in_sum(terms)[None]
        parts.append(in_write(value, write, patching["states"], patching["writing"]))
        in_replaced(terms, in_finite(value[0]), write["positions"])
    return in_written(parts)


def in_step_writes(model: Any, patching: Patching, site: SitePath) -> None:
    """Write the last state of each layer at the token that is being decoded."""
    for layer, write in patching["target"]["writes"].items():
        terms = in_terms(model, site, layer)
        value = in_sum(terms)[None]
        in_write(value, in_last(write, 1), patching["states"], patching["writing"])
        in_replaced(terms, in_finite(value[0]), slice(None))


def in_terms(model: Any, site: SitePath, layer: int) -> list[torch.Tensor]:
    """Return the tensors that add up to the states of a layer, each (n_tokens, d_model), as views.

    Args:
        model: The model.
        site: The site in a block.
        layer: The block; -1 is the input of block 0.
    """
    blocks = in_blocks(model, site)
    if layer < 0:
        args, kwargs = blocks[0].inputs
        index, name = site["argument"]
        terms = [kwargs[name] if name in kwargs else args[index]]
    else:
        part = blocks[layer]
        for name in site["part"].split(".") if site["part"] else ():
            part = getattr(part, name)
        value = part.output
        terms = [*value[: site["terms"]]] if isinstance(value, tuple | list) else [value]
    return [term.flatten(0, -2) for term in terms]


def in_sum(terms: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of tensors, in new memory."""
    total = terms[0].clone()
    for term in terms[1:]:
        total = total + term
    return total


def in_replaced(terms: list[torch.Tensor], states: torch.Tensor, positions: Any) -> None:
    """Replace the states at some positions, in place."""
    terms[0][positions] = states[positions]
    for term in terms[1:]:
        term[positions] = 0


def in_finite(states: torch.Tensor) -> torch.Tensor:
    """Return states with zeros for numbers that are not finite.

    Such numbers would stay in the engine's memory for keys and values, and reach prompts that use it later.
    The cell fails by what it has written (`in_results`).
    """
    return states.nan_to_num(0.0, 0.0, 0.0)
