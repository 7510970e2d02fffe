"""The workloads of the GPU benchmark: those of `benchmarks.speed`, larger, and a long description prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.speed.made import Scale, make
from benchmarks.speed.workloads import Workload
from patchscope_nn.models import Model

NAMES = ("W1", "W2", "W3", "W4", "W6")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large workloads are made.

    Attributes:
        contexts: The contexts of W2; one workload for each number.
        entities: The entities of W3.
        texts: The texts of W6.
        before: The tokens before W6's description prompt.
        tokens: The tokens of W4's target prompt.
        generated: The tokens that are generated.
    """

    contexts: tuple[int, ...] = (512, 1800)
    entities: int = 64
    texts: int = 256
    before: int = 2048
    tokens: int = 4096
    generated: int = 20


TINY = Sizes(contexts=(3,), entities=3, texts=8, before=80, tokens=120, generated=4)


def workloads(name: str, model: Model, sizes: Sizes) -> list[Workload]:
    """The workloads of a name: W2 is one for each number of contexts."""
    if name == "W2":
        made = [make(name, model, Scale(contexts=count)) for count in sizes.contexts]
        return [replace(one, name=f"{name}-{count}") for one, count in zip(made, sizes.contexts, strict=True)]
    if name == "W6":
        scale = Scale(entities=-(-sizes.texts // model.info.n_layers), before=sizes.before)
        return [make(name, model, replace(scale, generated=sizes.generated))]
    return [make(name, model, Scale(entities=sizes.entities, tokens=sizes.tokens, generated=sizes.generated))]
