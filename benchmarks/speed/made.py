"""The workloads W1 to W6, made for a model: its tokenizer and its depth."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.speed.workloads import SEED, Workload
from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.lower import eos_ids
from patchscope_nn.mappings import Affine
from patchscope_nn.models import Model
from patchscope_nn.spec import prompts

_SOURCE = "Diana, Princess of Wales"
_SPEAKERS = ("Anna", "Bob", "Carl", "Dora", "Emil", "Fred", "Gina", "Hans", "Ida", "Jack", "Kate", "Leo")
_LONG = (
    "A lighthouse keeper wrote down the weather every evening. On Monday the wind came from the north and "
    "the sea was grey; on Tuesday a fishing boat lost its nets; on Wednesday it rained from noon to night. "
)


@dataclass(frozen=True)
class Scale:
    """How large workloads are made.

    Attributes:
        times: How many times the source prompts; never one of them twice.
        contexts: The contexts of W2, before that.
        entities: The entities of W3, before that.
        tokens: The tokens of the long target prompt.
        before: The tokens before the description prompt of W6.
        generated: The tokens that are generated.
        describe: The description prompt.
    """

    times: int = 1
    contexts: int = 200
    entities: int = 30
    tokens: int = 512
    before: int = 1024
    generated: int = 20
    describe: str = prompts.DESCRIBE


def make(name: str, model: Model, scale: Scale | None = None) -> Workload:
    """A workload by its name."""
    return MAKERS[name](model, scale or Scale())


def _ids(model: Model, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer(text)["input_ids"])


def corpus() -> Iterator[str]:
    """Every text that workloads are made of, for a tokenizer that is made for them."""
    yield from (_SOURCE, _LONG, prompts.IDENTITY, prompts.DESCRIBE, f"{' '.join(_SPEAKERS)} says:")
    for name, column in (("contexts", "context"), ("entities", "entity")):
        yield from (str(row[column]) for row in load_rows(DataSpec(builtin=name)))


def opening(model: Model, count: int) -> tuple[int, ...]:
    """The first `count` ids of a long text, which a target prompt begins with."""
    return _ids(model, _LONG * (1 + count // 32))[:count]


def _builtin(name: str, column: str, count: int) -> list[str]:
    """`count` distinct texts, in no order; beyond the data's own, somebody says them."""
    texts = [str(row[column]) for row in load_rows(DataSpec(builtin=name))]
    random.Random(SEED).shuffle(texts)  # noqa: S311 (a seeded choice, no secret)
    found = [*texts, *(f"{speaker} says: {text}" for speaker in _SPEAKERS for text in texts)]
    if len(found) < count:
        raise ValueError(f"{count} texts were asked for, and there are {len(found)} of {name}.")
    return found[:count]


def _sweep(model: Model, *, name: str, title: str, texts: list[str], target: tuple[int, ...]) -> Workload:
    """All layers, l* = l; the callers change what differs."""
    return Workload(
        name=name,
        title=title,
        texts=tuple(texts),
        sources=tuple(_ids(model, text) for text in texts),
        target=target,
        layers=tuple(range(model.info.n_layers)),
    )


def _w1(model: Model, scale: Scale) -> Workload:
    texts = [_SOURCE, *_builtin("contexts", "context", scale.times - 1)]
    title = "one prompt pair, every l x every l*, identity prompt patched at its last token, next token"
    sweep = _sweep(model, name="W1", title=title, texts=texts, target=_ids(model, prompts.IDENTITY))
    return replace(sweep, target_layers=sweep.layers)


def _w1b(model: Model, scale: Scale) -> Workload:
    title = "W1, patched at the token before the last, so that two tokens of each cell must run"
    return replace(_w1(model, scale), name="W1b", title=title, position=-2)


def _w2(model: Model, scale: Scale) -> Workload:
    texts = _builtin("contexts", "context", scale.contexts * scale.times)
    title = f"{len(texts):,} contexts x every l, l* = l, identity prompt, next token"
    return _sweep(model, name="W2", title=title, texts=texts, target=_ids(model, prompts.IDENTITY))


def _w3(model: Model, scale: Scale) -> Workload:
    texts = _builtin("entities", "entity", scale.entities * scale.times)
    title = f"{len(texts)} entities x every l, l* = l, description prompt, {scale.generated} tokens generated"
    sweep = _sweep(model, name="W3", title=title, texts=texts, target=_ids(model, scale.describe))
    return replace(sweep, max_new_tokens=scale.generated, eos=eos_ids(model), long=True)


def _w4(model: Model, scale: Scale) -> Workload:
    query = _ids(model, prompts.IDENTITY)[-scale.tokens :]
    target = opening(model, scale.tokens - len(query)) + query
    title = f"W1 with a target prompt of {scale.tokens:,} tokens, patched at its last"
    return replace(_w1(model, scale), name="W4", title=title, target=target, long=True)


def _w5(model: Model, scale: Scale) -> Workload:
    title = "W1 from the model to another copy of it, through an affine mapping"
    mapping = near_identity(model.info.d_model)
    return replace(_w1(model, scale), name="W5", title=title, mapping=mapping, cross=True)


def _w6(model: Model, scale: Scale) -> Workload:
    sweep = _w3(model, scale)
    title = f"{sweep.title}, behind {scale.before:,} tokens"
    return replace(sweep, name="W6", title=title, target=opening(model, scale.before) + sweep.target)


def near_identity(d_model: int, *, seed: int = SEED) -> Affine:
    """A random affine mapping that is nearly the identity."""
    noise = torch.Generator().manual_seed(seed)
    weight = torch.eye(d_model) + 0.1 / d_model**0.5 * torch.randn(d_model, d_model, generator=noise)
    return Affine(weight, 0.01 * torch.randn(d_model, generator=noise))


MAKERS: dict[str, Callable[[Model, Scale], Workload]] = {
    "W1": _w1,
    "W1b": _w1b,
    "W2": _w2,
    "W3": _w3,
    "W4": _w4,
    "W5": _w5,
    "W6": _w6,
}
