"""Linear relational embeddings (Hernandez et al. 2023, arXiv 2308.09124): a relation as one affine map.

A prompt states a relation of a subject, `The capital of {subject} is`. Let s be the state of the subject's
last token at layer l, and o the last block's state at the prompt's last token. Then o is approximately
f(s) = beta J s + b, where J is the mean of do/ds over a few subjects, and b the mean of o - (do/ds) s. This
first-order slope is too small, which a factor beta above 1 corrects (section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.fitting.reading import Row, read_rows
from patchscope_nn.fitting.reporting import Progress, counted
from patchscope_nn.fitting.trained.frozen import Frozen, choose_layers, frozen
from patchscope_nn.fitting.trained.jacobian import jacobian_rows
from patchscope_nn.fitting.trained.kind import Layers, Option, Request, Rows, RowsAtATime, Seed
from patchscope_nn.fitting.trained.last_block import LastBlockKind
from patchscope_nn.fitting.trained.lens import Map, affine_map, compare, log_probabilities
from patchscope_nn.fitting.trained.outcome import Outcome
from patchscope_nn.fitting.trained.splits import Parts, split_items
from patchscope_nn.models import Model
from patchscope_nn.spec.encoding import encode
from patchscope_nn.spec.positions import resolve_positions
from patchscope_nn.spec.prompts import parse_prompt, render

#: The betas that are tried if none is given.
BETAS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 4.0, 5.0)


class Subject(NamedTuple):
    """The token ids of a subject's prompt, and the position of the subject's last token in it."""

    ids: tuple[int, ...]
    position: int


@dataclass(frozen=True, kw_only=True)
class RelationScore:
    """How well a relation's map predicts the model's own answers, for subjects it was not fitted on.

    Attributes:
        source_layer: l.
        target_layer: l*, the last block.
        beta: The slope's factor.
        n_subjects: The number of subjects scored.
        faithfulness: The share for which f and the model have the same top token (paper, section 3).
        kl_nats: The mean of KL(model || f).
        identity_faithfulness: The faithfulness of s, unmapped.
        mean_faithfulness: The faithfulness of one state for all subjects, the mean of o in the fit.
        mean_kl_nats: The KL of that state.
    """

    source_layer: int
    target_layer: int
    beta: float
    n_subjects: int
    faithfulness: float
    kl_nats: float
    identity_faithfulness: float
    mean_faithfulness: float
    mean_kl_nats: float


class _Slopes:
    """Means over the subjects of the fit: do/ds and o - (do/ds) s for each layer, and o."""

    def __init__(self, net: Frozen, subjects: Sequence[Subject], layers: Sequence[int]) -> None:
        size = net.model.info.d_model
        self.net, self.share = net, 1 / len(subjects)
        self.slope = {layer: torch.zeros(size, size) for layer in layers}
        self.offset = {layer: torch.zeros(size) for layer in layers}
        self.output = torch.zeros(size)

    def add(self, subject: Subject, *, at_a_time: int) -> None:
        """Differentiate one subject's prompt."""
        last = len(subject.ids) - 1
        for part in jacobian_rows(
            self.net, subject.ids, layers=list(self.slope), outputs=[last], at_a_time=at_a_time
        ):
            output = part.outputs[last, part.rows].float().cpu()
            self.output[part.rows] += self.share * output
            for layer, gradients in part.gradients.items():
                slope = gradients[:, subject.position].cpu()
                state = part.states[layer][subject.position].float().cpu()
                self.slope[layer][part.rows] += self.share * slope
                self.offset[layer][part.rows] += self.share * (output - slope @ state)

    def map(self, layer: int, *, beta: float, rank: int | None) -> dict[str, torch.Tensor]:
        """The map of a layer: `weight` = beta J, of `rank` directions unless that is None, and `bias`."""
        slope = self.slope[layer]
        if rank is not None:
            left, sizes, right = torch.linalg.svd(slope)
            slope = left[:, :rank] * sizes[:rank] @ right[:rank]
        return {"weight": beta * slope, "bias": self.offset[layer].clone()}


@checked
def fit_lre(
    model: Model,
    rows: Sequence[Mapping[str, Any]],
    *,
    prompt: Annotated[str, Option("States the relation: 'The capital of {country} is'.")],
    subject: Annotated[str, Option("The subject's column.")],
    layers: Layers = "all",
    subjects: Annotated[int, Option("How many it is fitted on.", 1)] = 8,
    beta: Annotated[float | None, Option("The slope's factor; chosen unless given.")] = None,
    rank: Annotated[int | None, Option("How many directions of the slope are kept.", 1)] = None,
    rows_at_a_time: RowsAtATime = 64,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> Outcome:
    """Fit a relation on some subjects, and score it on the others.

    Unless `beta` is given, each layer takes the one of `BETAS` with the least KL on the subjects of the fit.
    `rank` keeps the largest directions of J.

    Returns:
        For each (l, last block), `weight` and `bias`; `held_out` is a `RelationScore` for each.

    Raises:
        LayerError: A layer lies outside the model.
        DataError: A column is missing, there are too few rows, or a number is out of range.
        PositionError: A subject does not end with a whole token of its prompt.
        ModelError: What follows the model's last block is not known.
    """
    if rows_at_a_time < 1 or subjects < 1 or (rank is not None and not 1 <= rank <= model.info.d_model):
        raise DataError(
            f"subjects={subjects}, rank={rank} and rows_at_a_time={rows_at_a_time} should be 1 or more.",
            hint=f"The rank is at most d_model, {model.info.d_model}.",
        )
    chosen = choose_layers(model, layers)
    names = {_find_subject(model, row, prompt=prompt, subject=subject): str(row[subject]) for row in rows}
    parts = _split(list(names), subjects=subjects, seed=seed)
    with frozen(model) as net:
        slopes = _Slopes(net, parts.fitted, chosen)
        for example in counted(parts.fitted, progress):
            slopes.add(example, at_a_time=rows_at_a_time)
        fitted, held_out = (_read_answers(net, part, chosen) for part in (parts.fitted, parts.held_out))
        betas = {layer: fitted[layer].best_beta(slopes, rank) if beta is None else beta for layer in chosen}
        maps = {layer: slopes.map(layer, beta=betas[layer], rank=rank) for layer in chosen}
        scores = [
            held_out[layer].score(maps[layer], mean=slopes.output, beta=betas[layer]) for layer in chosen
        ]
    return Outcome(
        kind="lre",
        maps={(layer, model.info.n_layers - 1): tensors for layer, tensors in maps.items()},
        held_out=tuple(scores),
        provenance={
            "prompt": prompt,
            "subject": subject,
            "subjects": [names[example] for example in parts.fitted],
            "beta": {str(layer): factor for layer, factor in betas.items()},
            "rank": rank,
            "seed": seed,
            "n_subjects": {"fitted": len(parts.fitted), "held_out": len(parts.held_out)},
        },
    )


def _split(prompts: Sequence[Subject], *, subjects: int, seed: int) -> Parts[Subject]:
    """Choose the prompts that the relation is fitted on, and hold out the others."""
    if len(prompts) <= subjects:
        raise DataError(
            f"{len(prompts)} different prompts are too few to fit on {subjects} and hold others out.",
            hint=f"Give {subjects + 1} rows or more, or fit on fewer subjects.",
        )
    return split_items(prompts, held_out=1 - subjects / len(prompts), seed=seed, what="prompts")


def _find_subject(model: Model, row: Mapping[str, Any], *, prompt: str, subject: str) -> Subject:
    """Fill in a relation's prompt, and find the subject's last token in it."""
    if subject not in row:
        raise DataError(
            f"subject={subject!r} is not a column of the data.", hint=did_you_mean(subject, list(row))
        )
    if f"{{{subject}}}" not in prompt:
        raise DataError(
            f"prompt={prompt!r} does not name the subject.", hint=f"Write {{{subject}}} in its place."
        )
    encoded = encode(render(parse_prompt(prompt), row, field="prompt"), model.tokenizer, field="prompt")
    ((position,),) = resolve_positions(str(row[subject]), encoded, field="subject")
    return Subject(encoded.ids, position)


class _Answers:
    """The model's own s and o for some subjects, (n, d_model), to compare maps of one layer with."""

    def __init__(self, net: Frozen, states: torch.Tensor, outputs: torch.Tensor, layer: int) -> None:
        self.net, self.layer, self.states = net, layer, states
        with torch.no_grad():
            self.own = log_probabilities(net, outputs)

    def compare(self, f: Map) -> tuple[float, float]:
        """The share of equal top tokens, and the mean KL(model || f) in nats."""
        with torch.no_grad():
            kl, same = compare(self.own, log_probabilities(self.net, f(self.states)))
        return float(same.double().mean()), float(kl.mean())

    def best_beta(self, slopes: _Slopes, rank: int | None) -> float:
        """The beta of `BETAS` with the least KL."""
        unscaled = slopes.map(self.layer, beta=1.0, rank=rank)

        def loss(beta: float) -> float:
            scaled = unscaled | {"weight": beta * unscaled["weight"]}
            return self.compare(affine_map(scaled, self.net.device))[1]

        return min(BETAS, key=loss)

    def score(self, tensors: Mapping[str, torch.Tensor], *, mean: torch.Tensor, beta: float) -> RelationScore:
        """Score f, the identity, and a map that gives the state `mean` for all subjects."""
        faithfulness, kl = self.compare(affine_map(tensors, self.net.device))
        mean_faithfulness, mean_kl = self.compare(lambda states: mean.to(states).expand(len(states), -1))
        return RelationScore(
            source_layer=self.layer,
            target_layer=self.net.last,
            beta=beta,
            n_subjects=len(self.states),
            faithfulness=faithfulness,
            kl_nats=kl,
            identity_faithfulness=self.compare(lambda states: states)[0],
            mean_faithfulness=mean_faithfulness,
            mean_kl_nats=mean_kl,
        )


def _read_answers(net: Frozen, subjects: Sequence[Subject], layers: Sequence[int]) -> dict[int, _Answers]:
    """Read s at each layer and o for some subjects."""
    rows = [Row(ids, (position, len(ids) - 1)) for ids, position in subjects]
    read = {
        layer: torch.stack(states)
        for layer, states in read_rows(rows, {*layers, net.last}, net.model).items()
    }
    outputs = read[net.last][:, 1]
    return {layer: _Answers(net, read[layer][:, 0], outputs, layer) for layer in layers}


@dataclass(frozen=True, kw_only=True)
class RelationKind(LastBlockKind):
    """The kind that is fitted on prompts which state a relation."""

    def check_data(self, request: Request, data: Rows) -> None:
        """As in `MappingKind`."""
        options = request.options
        names = {name: options.options[name] for name in ("prompt", "subject")}
        prompts = {_find_subject(request.source, row, **names) for row in data.rows}
        _split(list(prompts), subjects=self.option(options, "subjects"), seed=options.seed)


KIND = RelationKind(
    name="lre",
    summary="A relation as one affine map, from a subject's state to the last block (arXiv 2308.09124).",
    fit=fit_lre,
    reads="rows",
    unit="subjects",
)
