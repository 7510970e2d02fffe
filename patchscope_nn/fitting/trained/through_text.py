"""Maps trained through a text: the model that reads T, with f(h) written into it, should continue with it.

This is a SelfIE-style adapter (Pepper et al. 2026, arXiv 2602.10352): the state h of a source prompt at
(i, l) is mapped and written at T's placeholder at layer l*, and the loss is the cross-entropy of the row's
text after T. The kinds have from one to d^2 parameters, and all start as the identity:

    trained_scale          f(h) = a h
    trained_scalar_affine  f(h) = a h + b
    trained_low_rank       f(h) = h + U V h + b
    trained_affine         f(h) = W h + b

Much of a map's gain may come from its bias, which does not depend on the state. Therefore each fit is also
scored with the identity and with the states of other rows; the difference is what the state itself adds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import LayerError, MappingError, did_you_mean
from patchscope_nn.fitting.reading import Row, read_rows
from patchscope_nn.fitting.reporting import Progress
from patchscope_nn.fitting.trained.examples import Example, make_examples
from patchscope_nn.fitting.trained.forms import Affine, Form, LowRank, ScalarAffine, Scale
from patchscope_nn.fitting.trained.frozen import Frozen, Write, check_weights, frozen
from patchscope_nn.fitting.trained.kind import MappingKind, Option, Request, Rows
from patchscope_nn.fitting.trained.outcome import Outcome
from patchscope_nn.fitting.trained.splits import Parts, split_items
from patchscope_nn.fitting.trained.training import Training, descend
from patchscope_nn.models import Model
from patchscope_nn.spec import Source, Target
from patchscope_nn.spec.layers import resolve_layers

#: The fields of a source and a target that a training uses.
_USED = ("prompt", "position", "layer")
#: The rank of U V if none is given.
_RANK = 8
#: How many examples a forward pass scores.
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """The negative log-likelihood of the texts of held-out rows, in nats per token.

    Attributes:
        source_layer: l.
        target_layer: l*.
        n_rows: The number of examples scored.
        n_tokens: The number of tokens in their texts.
        nll_nats: With f(h) in T.
        untrained_nll_nats: With h in T, unmapped.
        shuffled_nll_nats: With f(h) of another row, one that was fitted on.
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
    text: Annotated[str, Option("What should follow T: ' {description}'.")],
    target_model: Model | None = None,
    rank: Annotated[int | None, Option("The rank of U V, for trained_low_rank; 8 unless given.", 1)] = None,
    training: Training | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train one map of a kind of `KINDS` for each (l, l*); `training.batch` counts rows.

    If the layer of `target` is `same`, l* is l; other target layers are crossed with all l. `target_model` is
    M*, by default M. Prompts and `text` are filled in from each row.

    Returns:
        For each (l, l*) its tensors; `held_out` is a `TextScore` for each.

    Raises:
        InputError: The kind, a prompt, a position, a layer or the text cannot be resolved, there are too few
            rows, or the two models' states differ in size.
    """
    to = target_model or model
    chosen_rank = _check_form(kind, rank, size=model.info.d_model, other=to.info.d_model)
    training = training or KINDS[kind].training or Training()
    pairs = _find_pairs(model, to, source=source, target=target)
    examples = make_examples(rows, model=model, to=to, source=source, target=target, text=text)
    parts = _split(examples, training)
    maps, scores, steps = {}, [], {}
    with frozen(to) as net:
        read = _read(model, parts, sorted({layer for layer, _ in pairs}), net.device)
        for index, (layer, layer_star) in enumerate(pairs):
            torch.manual_seed(training.seed)  # for V, the only random start
            form = KINDS[kind].form(model.info.d_model, chosen_rank).to(net.device)
            course = _Course(net, read[layer], layer=layer_star)
            own_progress = _progress_within(progress, index, len(pairs))
            steps[f"{layer},{layer_star}"] = course.train(form, training, own_progress)
            maps[layer, layer_star] = form.tensors()
            scores.append(course.score(form, source_layer=layer))
    return Outcome(
        kind=kind,
        maps=maps,
        held_out=tuple(scores),
        provenance={
            "source": source.model_dump(mode="json"),
            "target": target.model_dump(mode="json"),
            "text": text,
            "rank": chosen_rank if kind == "trained_low_rank" else None,
            "training": training.model_dump(),
            "n_rows": parts.counts(),
            "left_at_step": steps,
        },
    )


def _check_form(kind: str, rank: int | None, *, size: int, other: int) -> int:
    """Check the kind, its rank and the sizes of both models' states, and return the rank."""
    if kind not in KINDS:
        raise MappingError(
            f"{kind!r} is not a kind that is trained through a text.", hint=did_you_mean(kind, list(KINDS))
        )
    if rank is not None and kind != "trained_low_rank":
        raise MappingError(f"rank={rank} belongs to trained_low_rank, and this is {kind}; leave it out.")
    rank = min(_RANK, size) if rank is None else rank
    if other != size or not 1 <= rank <= size:
        raise MappingError(
            f"{kind} of rank {rank} starts as the identity, between states of {size} numbers and of {other}.",
            hint="Train between models of one d_model, with a rank of 1 to d_model; else fit: affine.",
        )
    return rank


def _find_pairs(model: Model, to: Model, *, source: Source, target: Target) -> list[tuple[int, int]]:
    """Resolve the layers to pairs (l, l*). A source or target may set only the fields of `_USED`."""
    for name, side in (("source", source), ("target", target)):
        for field, description in type(side).model_fields.items():
            value = getattr(side, field)
            if field not in _USED and value != description.default:
                raise MappingError(
                    f"{name}.{field}={value!r} cannot be used here: a map is trained on outputs of blocks, "
                    "which replace the states at T's placeholder.",
                    hint=f"Leave it out; training uses {', '.join(_USED)}.",
                )
    layers = resolve_layers(source.layer, n_layers=model.info.n_layers, field="source.layer")
    if target.layer == "same":
        if beyond := [layer for layer in layers if layer >= to.info.n_layers]:
            raise LayerError(
                f"target.layer=same needs layer {beyond[0]} of {to.info.name}, which has {to.info.n_layers}.",
                hint="Give the target's layers.",
            )
        return [(layer, layer) for layer in layers]
    written = resolve_layers(target.layer, n_layers=to.info.n_layers, field="target.layer")
    return [(layer, layer_star) for layer in layers for layer_star in written]


def _split(examples: Sequence[Example], training: Training) -> Parts[Example]:
    """Split examples by their source prompts, so that no prompt is both fitted on and held out."""
    prompts = split_items([each.source for each in examples], what="source prompts", **training.shares)
    return Parts(*([example for example in examples if example.source in set(part)] for part in prompts))


#: A training example with its source states, (n_read, d_model) in float32.
_Given: TypeAlias = tuple[Example, torch.Tensor]
_Map: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def _read(
    model: Model, parts: Parts[Example], layers: Sequence[int], device: Any
) -> dict[int, Parts[_Given]]:
    """Read the source states of all examples at each layer."""
    check_weights(model)
    read = [
        read_rows([Row(each.source, each.source_positions) for each in part], layers, model) for part in parts
    ]

    def of_layer(layer: int) -> Iterator[list[_Given]]:
        for part, states in zip(parts, read, strict=True):
            yield [(each, state.float().to(device)) for each, state in zip(part, states[layer], strict=True)]

    return {layer: Parts(*of_layer(layer)) for layer in layers}


class _Course:
    """The training and scoring of one map, written at `layer`."""

    def __init__(self, net: Frozen, parts: Parts[_Given], *, layer: int) -> None:
        self.net, self.parts, self.layer = net, parts, layer

    def train(self, f: torch.nn.Module, training: Training, progress: Progress | None) -> int:
        """Train a map, and return the step whose weights it has."""
        fitted, generator = self.parts.fitted, torch.Generator().manual_seed(training.seed)

        def losses() -> Iterator[torch.Tensor]:
            batch = torch.randperm(len(fitted), generator=generator)[: training.batch].tolist()
            loss, tokens = self._nll([fitted[index] for index in batch], f)
            yield loss / tokens

        def score() -> dict[str, float]:
            return {"f": self._mean(self.parts.stopping, f)}

        return descend({"f": f}, losses=losses, score=score, training=training, progress=progress)["f"]

    def score(self, f: torch.nn.Module, *, source_layer: int) -> TextScore:
        """Score a map on the held-out examples."""
        fitted, held = self.parts.fitted, self.parts.held_out
        shuffled = [(each, fitted[index % len(fitted)][1]) for index, (each, _) in enumerate(held)]
        with torch.no_grad():
            return TextScore(
                source_layer=source_layer,
                target_layer=self.layer,
                n_rows=len(held),
                n_tokens=sum(len(each.text) for each, _ in held),
                nll_nats=self._mean(held, f),
                untrained_nll_nats=self._mean(held, lambda states: states),
                shuffled_nll_nats=self._mean(shuffled, f),
            )

    def _mean(self, examples: Sequence[_Given], f: _Map) -> float:
        """The mean -log p of a token of the examples' texts, in nats."""
        batches = [examples[start : start + _BATCH] for start in range(0, len(examples), _BATCH)]
        sums = [self._nll(batch, f) for batch in batches]
        return sum(float(loss) for loss, _ in sums) / sum(tokens for _, tokens in sums)

    def _nll(self, examples: Sequence[_Given], f: _Map) -> tuple[torch.Tensor, int]:
        """The sum of -log p over the tokens of the texts after T, in nats, and the number of these tokens."""
        given = [example for example, _ in examples]
        mapped = f(torch.stack([states for _, states in examples]))
        write = Write(layer=self.layer, positions=[each.target_positions for each in given], states=mapped)
        batch = self.net.batch([each.target + each.text for each in given])
        last = self.net.run(batch, read={self.net.last}, writes=[write])[self.net.last]
        rows = [row for row, each in enumerate(given) for _ in each.text]
        columns = [len(each.target) - 1 + index for each in given for index in range(len(each.text))]
        expected = torch.tensor([token for each in given for token in each.text], device=last.device)
        logits = self.net.unembed(last[rows, columns]).float()
        return torch.nn.functional.cross_entropy(logits, expected, reduction="sum"), len(expected)


def _progress_within(progress: Progress | None, index: int, count: int) -> Progress | None:
    """Reports the progress of one map as progress of all maps."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, count * total)


@dataclass(frozen=True, kw_only=True)
class ThroughText(MappingKind):
    """A kind whose map is trained through a text; `form` is the map as a module."""

    form: type[Form]

    def shapes(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """As in `MappingKind`."""
        with torch.device("meta"):
            tensors = self.form(d_model, 1).tensors()
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def check(self, request: Request) -> None:
        """As in `MappingKind`."""
        source, target = request.prompts
        _find_pairs(request.source, request.target, source=source, target=target)
        size, other = request.source.info.d_model, request.target.info.d_model
        rank = request.options.rank
        if size != other or (rank or 1) > size:
            raise MappingError(
                f"{self.name} starts as the identity, and the states have {size} numbers and {other}"
                + (f"; its rank is {rank}." if rank else "."),
                hint="Train between models of one d_model, with a rank of at most that; else {fit: affine}.",
            )

    def check_data(self, request: Request, data: Rows) -> None:
        """As in `MappingKind`."""
        source, target = request.prompts
        models = {"model": request.source, "to": request.target}
        text = request.options.options["text"]
        examples = make_examples(data.rows, **models, source=source, target=target, text=text)
        _split(examples, self.training_of(request.options))

    def arguments(self, request: Request, layers: Sequence[int]) -> dict[str, Any]:  # noqa: ARG002 (S names them)
        """As in `MappingKind`."""
        source, target = request.prompts
        training = self.training_of(request.options)
        return {"source": source, "target": target, "training": training, **self.own_options(request.options)}


#: The kinds of this file, by name. Maps with fewer parameters take larger steps.
KINDS: dict[str, ThroughText] = {
    name: ThroughText(
        name=name,
        summary=f"f(h) = {formula}, trained so that a text follows T with f(h) in it (arXiv 2602.10352).",
        fit=functools.partial(fit_through_text, kind=name),
        reads="rows",
        training=Training(learning_rate=learning_rate, batch=16),
        two_models=True,
        uses_prompts=True,
        form=form,
    )
    for name, formula, form, learning_rate in (
        ("trained_scale", "a h", Scale, 0.05),
        ("trained_scalar_affine", "a h + b", ScalarAffine, 0.02),
        ("trained_low_rank", "h + U V h + b", LowRank, 0.002),
        ("trained_affine", "W h + b", Affine, 0.001),
    )
}
