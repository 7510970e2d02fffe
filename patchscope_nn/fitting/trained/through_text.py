"""Maps trained through the frozen model: T, with f(h) in it, should be followed by a text of the data.

This is a SelfIE-style adapter (Pepper et al. 2026, arXiv 2602.10352): the state h of a source prompt at
(i, l) is mapped and written at T's placeholder at layer l*, and the loss is the cross-entropy of the row's
text after T. The kinds go from one number to d^2 of them, and all start as the identity:

    trained_scale          f(h) = a h
    trained_scalar_affine  f(h) = a h + b
    trained_low_rank       f(h) = h + U V h + b
    trained_affine         f(h) = W h + b

Much of what such a map gains may be its bias, which speaks of the data and of no state. So a fit is scored
beside the untrained map, and with the states of other rows: what a state adds is the difference to these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import LayerError, MappingError, did_you_mean
from patchscope_nn.fitting.trained.examples import BATCH, Example, make_examples, read_examples, text_nll_nats
from patchscope_nn.fitting.trained.frozen import Frozen, frozen
from patchscope_nn.fitting.trained.held_out import Parts, deal
from patchscope_nn.fitting.trained.outcome import Outcome, Progress
from patchscope_nn.fitting.trained.training import Training, descend
from patchscope_nn.models import Model
from patchscope_nn.spec import Source, Target
from patchscope_nn.spec.layers import resolve_layers


class Scale(torch.nn.Module):
    """f(h) = a h."""

    def __init__(self, _size: int, _rank: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (..., d_model) -> (..., d_model)."""
        return self.scale * states

    def tensors(self) -> dict[str, torch.Tensor]:
        """The map, by the names a file has for its parts."""
        return {"scale": self.scale.detach().clone()}


class ScalarAffine(torch.nn.Module):
    """f(h) = a h + b."""

    def __init__(self, size: int, _rank: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.bias = torch.nn.Parameter(torch.zeros(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (..., d_model) -> (..., d_model)."""
        return self.scale * states + self.bias

    def tensors(self) -> dict[str, torch.Tensor]:
        """The map, by the names a file has for its parts."""
        return {"scale": self.scale.detach().clone(), "bias": self.bias.detach().clone()}


class LowRank(torch.nn.Module):
    """f(h) = h + U V h + b; U is zero at first, and V random."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(rank, size) / size**0.5)
        self.up = torch.nn.Parameter(torch.zeros(size, rank))
        self.bias = torch.nn.Parameter(torch.zeros(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (..., d_model) -> (..., d_model)."""
        return states + states @ self.down.T @ self.up.T + self.bias

    def tensors(self) -> dict[str, torch.Tensor]:
        """The map, by the names a file has for its parts."""
        whole = torch.eye(len(self.bias)).to(self.bias) + self.up @ self.down
        return {"weight": whole.detach(), "bias": self.bias.detach().clone()}


class Affine(torch.nn.Module):
    """f(h) = W h + b."""

    def __init__(self, size: int, _rank: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(size))
        self.bias = torch.nn.Parameter(torch.zeros(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (..., d_model) -> (..., d_model)."""
        return torch.nn.functional.linear(states, self.weight, self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The map, by the names a file has for its parts."""
        return {"weight": self.weight.detach().clone(), "bias": self.bias.detach().clone()}


#: Kind -> its module, and the rate it is trained with: fewer numbers take larger steps.
KINDS: dict[str, tuple[Any, float]] = {
    "trained_scale": (Scale, 0.05),
    "trained_scalar_affine": (ScalarAffine, 0.02),
    "trained_low_rank": (LowRank, 0.002),
    "trained_affine": (Affine, 0.001),
}


#: What of a source and of a target a map is trained with.
_USED = ("prompt", "position", "layer")
#: The rank of U V where none is given.
_RANK = 8


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What the texts of held-out rows cost, in nats for each of their tokens.

    Attributes:
        source_layer: l.
        target_layer: l*.
        n_rows: How many rows were scored.
        n_tokens: How many tokens their texts have.
        nll_nats: With f(h) in T.
        untrained_nll_nats: With h in T.
        shuffled_nll_nats: With f of the state of a row that was fitted on.
    """

    source_layer: int
    target_layer: int
    n_rows: int
    n_tokens: int
    nll_nats: float
    untrained_nll_nats: float
    shuffled_nll_nats: float


@checked
def fit_through_text(
    model: Model,
    rows: Sequence[Mapping[str, Any]],
    *,
    kind: str,
    source: Source,
    target: Target,
    text: str,
    target_model: Model | None = None,
    rank: int | None = None,
    training: Training | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train one map for each (l, l*).

    Args:
        model: M, whose states are read.
        rows: The data.
        kind: One of `KINDS`.
        source: S, i and l.
        target: T, i* and l*; `same` pairs l* with l, anything else is crossed with it.
        text: What should follow T, for example ` {description}`; the data fill `{column}` placeholders.
        target_model: M*, which reads T; None is M.
        rank: The rank of U V, for `trained_low_rank` alone; None is 8.
        training: How; a batch is of rows. None takes the kind's learning rate, and batches of 16.
        progress: Called with (steps done, steps in all).

    Returns:
        For each (l, l*) its tensors; `held_out` is a `TextScore` for each.

    Raises:
        InputError: The kind, a prompt, a position, a layer or the text does not resolve, the rows are too
            few, or the two models' states differ in size.
    """
    to = target_model or model
    if kind not in KINDS:
        raise MappingError(f"{kind!r} is trained through no text.", hint=did_you_mean(kind, list(KINDS)))
    make, rate = KINDS[kind]
    size = model.info.d_model
    if rank is not None and kind != "trained_low_rank":
        raise MappingError(f"rank={rank} belongs to trained_low_rank, and this is {kind}; leave it out.")
    rank = min(_RANK, size) if rank is None else rank
    if to.info.d_model != size or not 1 <= rank <= size:
        raise MappingError(
            f"{kind} of rank {rank} starts as the identity, between states of {size} numbers and of "
            f"{to.info.d_model}.",
            hint="Train between models of one d_model, with a rank of 1 to d_model; else fit: affine.",
        )
    training = training or Training(learning_rate=rate, batch=16)
    pairs = find_pairs(model, to, source=source, target=target)
    examples = make_examples(rows, model=model, to=to, source=source, target=target, text=text)
    dealt = deal(
        [one.source for one in examples],
        held_out=training.held_out,
        stopping=training.stopping,
        seed=training.seed,
        what="source prompts",
    )
    parts = Parts(*([one for one in examples if one.source in set(part)] for part in dealt))
    maps, scores, steps = {}, [], {}
    with frozen(to) as net:
        read = _read(model, net, parts, sorted({layer for layer, _ in pairs}))
        for number, (layer, layer_star) in enumerate(pairs):
            torch.manual_seed(training.seed)  # for V, the one random start there is
            one = make(size, rank).to(net.device)
            course = _Course(net, parts, read[layer], layer=layer_star, training=training)
            steps[f"{layer},{layer_star}"] = course.train(one, _later(progress, number, len(pairs)))
            maps[layer, layer_star] = one.tensors()
            scores.append(course.score(one, source_layer=layer))
    return Outcome(
        kind=kind,
        maps=maps,
        held_out=tuple(scores),
        provenance={
            "source": source.model_dump(mode="json"),
            "target": target.model_dump(mode="json"),
            "text": text,
            "rank": rank if kind == "trained_low_rank" else None,
            "training": training.model_dump(),
            "n_rows": parts.counts(),
            "left_at_step": steps,
        },
    )


def find_pairs(model: Model, to: Model, *, source: Source, target: Target) -> list[tuple[int, int]]:
    """The (l, l*) of a source and a target, which name a prompt, a position and layers, and nothing else.

    Raises:
        LayerError: A layer lies outside its model.
        MappingError: Something else of the source or the target is set.
    """
    for name, side in (("source", source), ("target", target)):
        for field, about in type(side).model_fields.items():
            given = getattr(side, field)
            if field not in _USED and given != about.default:
                raise MappingError(
                    f"{name}.{field}={given!r}: a map is trained with states of a prompt, at the blocks' "
                    "outputs, which replace others while T is read.",
                    hint=f"Leave it out; what is used is {', '.join(_USED)}.",
                )
    layers = resolve_layers(source.layer, n_layers=model.info.n_layers, field="source.layer")
    if target.layer == "same":
        beyond = [layer for layer in layers if layer >= to.info.n_layers]
        if beyond:
            raise LayerError(
                f"target.layer=same asks {to.info.name} for layer {beyond[0]}; it has {to.info.n_layers}.",
                hint="Give the target's layers.",
            )
        return [(layer, layer) for layer in layers]
    written = resolve_layers(target.layer, n_layers=to.info.n_layers, field="target.layer")
    return [(layer, layer_star) for layer in layers for layer_star in written]


class _States(NamedTuple):
    """The states of the examples of each part, (n_examples, n_read, d_model), in float32."""

    fitted: torch.Tensor
    stopping: torch.Tensor
    held_out: torch.Tensor


def _read(model: Model, net: Frozen, parts: Parts[Example], layers: Sequence[int]) -> dict[int, _States]:
    """What the examples read of each layer."""
    read = []
    with frozen(model, unembeds=False) as source:
        for part in parts:
            found = read_examples(source, part, layers)
            read.append({layer: states.float().to(net.device) for layer, states in found.items()})
    return {layer: _States(*(part[layer] for part in read)) for layer in layers}


class _Course:
    """The training of one map."""

    def __init__(
        self,
        net: Frozen,
        parts: Parts[Example],
        states: _States,
        *,
        layer: int,
        training: Training,
    ) -> None:
        self.net, self.parts, self.states = net, parts, states
        self.layer, self.training = layer, training
        self._generator = torch.Generator().manual_seed(training.seed)

    def train(self, one: torch.nn.Module, progress: Progress | None) -> int:
        """Train a map, and say at which step it was left."""

        def losses() -> Iterator[torch.Tensor]:
            count = len(self.parts.fitted)
            chosen = torch.randperm(count, generator=self._generator)[: self.training.batch].tolist()
            lost, tokens = self._lost(
                [self.parts.fitted[row] for row in chosen], one(self.states.fitted[chosen])
            )
            yield lost / tokens

        return descend(
            {"f": one},
            losses=losses,
            score=lambda: {"f": self._mean(self.parts.stopping, self.states.stopping, one)},
            training=self.training,
            progress=progress,
        )["f"]

    def score(self, one: torch.nn.Module, *, source_layer: int) -> TextScore:
        """Score a map on the rows that are held out."""
        held = self.parts.held_out
        other = torch.arange(len(held)) % len(self.parts.fitted)
        with torch.no_grad():
            return TextScore(
                source_layer=source_layer,
                target_layer=self.layer,
                n_rows=len(held),
                n_tokens=sum(len(example.text) for example in held),
                nll_nats=self._mean(held, self.states.held_out, one),
                untrained_nll_nats=self._mean(held, self.states.held_out, lambda states: states),
                shuffled_nll_nats=self._mean(held, self.states.fitted[other], one),
            )

    def _mean(
        self, examples: Sequence[Example], states: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor]
    ) -> float:
        lost, tokens = 0.0, 0
        for start in range(0, len(examples), BATCH):
            rows = slice(start, start + BATCH)
            more, count = self._lost(examples[rows], f(states[rows]))
            lost, tokens = lost + float(more), tokens + count
        return lost / tokens

    def _lost(self, examples: Sequence[Example], mapped: torch.Tensor) -> tuple[torch.Tensor, int]:
        return text_nll_nats(self.net, examples, mapped, layer=self.layer)


def _later(progress: Progress | None, number: int, count: int) -> Progress | None:
    """The progress of one of several courses, as one of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)
