"""Linear relational embeddings (Hernandez et al. 2023, arXiv 2308.09124): a relation as one affine map.

A prompt states a relation of a subject, `The capital of {subject} is`. With s the state of the subject's
last token at layer l, and o the last block's state at the prompt's last token, o is nearly
f(s) = beta J s + b, where J is the mean over a few subjects of do/ds, and b the mean of o - (do/ds) s. This
first-order slope comes out too small, which a factor beta above 1 mends (section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.fitting.trained.frozen import Frozen, choose_layers, frozen
from patchscope_nn.fitting.trained.held_out import deal
from patchscope_nn.fitting.trained.jacobian import jacobian_rows
from patchscope_nn.fitting.trained.lens import Map, affine, kl_nats, log_probabilities
from patchscope_nn.fitting.trained.outcome import Outcome, Progress
from patchscope_nn.models import Model
from patchscope_nn.spec.positions import resolve_positions
from patchscope_nn.spec.prompts import encode, parse_prompt, render

#: The betas that are tried where none is given.
BETAS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 4.0, 5.0)

#: How many subjects a relation is fitted at (the paper's n).
SUBJECTS = 8


class Subject(NamedTuple):
    """A subject in its prompt.

    Attributes:
        ids: The prompt's token ids.
        position: The subject's last token.
    """

    ids: tuple[int, ...]
    position: int


@dataclass(frozen=True, kw_only=True)
class RelationScore:
    """How well a relation's map foretells what the model says of subjects that it was not fitted on.

    Attributes:
        source_layer: l.
        target_layer: l*, the last block.
        beta: The slope's factor.
        n_subjects: How many subjects were scored.
        faithfulness: The share whose top token through f is the model's (the paper's word, section 3).
        kl_nats: The mean of KL(model || f).
        identity_faithfulness: The same share of s, unmapped.
        mean_faithfulness: The same share of one state for all subjects: the mean of o over those fitted on.
        mean_kl_nats: The KL of that.
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
    """Means over the subjects fitted on: do/ds, s and o - (do/ds) s for each layer, and o."""

    def __init__(self, net: Frozen, subjects: Sequence[Subject], layers: Sequence[int]) -> None:
        size, share = net.model.info.d_model, 1 / len(subjects)
        self.net, self.count = net, len(subjects)
        self.slope = {layer: torch.zeros(size, size) for layer in layers}
        self.offset = {layer: torch.zeros(size) for layer in layers}
        self.output = torch.zeros(size)
        self._share = share

    def add(self, subject: Subject, *, at_a_time: int) -> None:
        """Differentiate one subject's prompt."""
        last = len(subject.ids) - 1
        for found in jacobian_rows(
            self.net, subject.ids, layers=list(self.slope), outputs=[last], at_a_time=at_a_time
        ):
            output = found.outputs[last, found.rows].float().cpu()
            self.output[found.rows] += self._share * output
            for layer, gradients in found.gradients.items():
                slope = gradients[:, subject.position].cpu()
                state = found.states[layer][subject.position].float().cpu()
                self.slope[layer][found.rows] += self._share * slope
                self.offset[layer][found.rows] += self._share * (output - slope @ state)

    def map(self, layer: int, *, beta: float, rank: int | None) -> dict[str, torch.Tensor]:
        """The map of a layer: `weight` = beta J, of `rank` directions where it is given, and `bias`."""
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
    prompt: str,
    subject: str,
    layers: Any = "all",
    subjects: int = SUBJECTS,
    beta: float | None = None,
    rank: int | None = None,
    rows_at_a_time: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """Fit a relation at some subjects, and score it on the others.

    Args:
        model: The model.
        rows: The data.
        prompt: States the relation; `{column}` placeholders are filled by the data, and one is the subject.
        subject: The subject's column.
        layers: l, each with l* the last block.
        subjects: How many subjects it is fitted on (the paper's n).
        beta: The slope's factor; None takes, for each layer, that of `BETAS` with which f foretells the
            model best at the subjects fitted on.
        rank: How many directions of J are kept, the largest first; None keeps all.
        rows_at_a_time: How many rows of the Jacobians a backward pass gives.
        seed: Decides which subjects.
        progress: Called with (subjects done, subjects in all).

    Returns:
        For each (l, last block), `weight` and `bias`; `held_out` is a `RelationScore` for each.

    Raises:
        LayerError: A layer lies outside the model.
        DataError: There is no such column, there are too few rows, or a number is out of range.
        PositionError: A subject covers no whole token of its prompt.
        ModelError: What follows the model's last block is not known.
    """
    if rows_at_a_time < 1 or subjects < 1 or (rank is not None and not 1 <= rank <= model.info.d_model):
        raise DataError(
            f"subjects={subjects}, rank={rank} and rows_at_a_time={rows_at_a_time} should be 1 or more.",
            hint=f"The rank is at most d_model, {model.info.d_model}.",
        )
    chosen = choose_layers(model, layers)
    found = [find_subject(model, row, prompt=prompt, subject=subject) for row in rows]
    named = dict(zip(found, (str(row[subject]) for row in rows), strict=True))
    found = list(named)
    check_subjects(len(found), subjects)
    parts = deal(found, held_out=1 - subjects / len(found), seed=seed, what="prompts")
    with frozen(model) as net:
        slopes = _Slopes(net, parts.fitted, chosen)
        for done, one in enumerate(parts.fitted, start=1):
            slopes.add(one, at_a_time=rows_at_a_time)
            if progress is not None:
                progress(done, len(parts.fitted))
        maps, scores, betas = {}, [], {}
        for layer in chosen:
            known = _Known(net, parts.fitted, layer)
            betas[layer] = known.best_beta(slopes, rank) if beta is None else beta
            maps[layer] = slopes.map(layer, beta=betas[layer], rank=rank)
            others = _Known(net, parts.held_out, layer)
            scores.append(others.score(maps[layer], mean=slopes.output, beta=betas[layer]))
    return Outcome(
        kind="lre",
        maps={(layer, model.info.n_layers - 1): tensors for layer, tensors in maps.items()},
        held_out=tuple(scores),
        provenance={
            "prompt": prompt,
            "subject": subject,
            "subjects": [named[one] for one in parts.fitted],
            "beta": {str(layer): one for layer, one in betas.items()},
            "rank": rank,
            "seed": seed,
            "n_subjects": {"fitted": len(parts.fitted), "held_out": len(parts.held_out)},
        },
    )


def check_subjects(count: int, subjects: int) -> None:
    """See that of `count` prompts some are left over when a relation is fitted at `subjects`.

    Raises:
        DataError: There are none.
    """
    if count <= subjects:
        raise DataError(
            f"{count} different prompts are too few to fit at {subjects} and hold others out.",
            hint=f"Give {subjects + 1} rows or more, or fit at fewer subjects.",
        )


def find_subject(model: Model, row: Mapping[str, Any], *, prompt: str, subject: str) -> Subject:
    """Fill a relation's prompt, and find the subject's last token in it.

    Raises:
        DataError: There is no such column, or the prompt does not name it.
        PositionError: The subject covers no whole token.
    """
    if subject not in row:
        raise DataError(
            f"subject={subject!r} is no column of the data.", hint=did_you_mean(subject, list(row))
        )
    if f"{{{subject}}}" not in prompt:
        raise DataError(
            f"prompt={prompt!r} does not name the subject.", hint=f"Write {{{subject}}} where it stands."
        )
    encoded = encode(render(parse_prompt(prompt), row, field="prompt"), model.tokenizer, field="prompt")
    ((position,),) = resolve_positions(str(row[subject]), encoded, field="subject")
    return Subject(encoded.ids, position)


class _Known:
    """What the model makes of some subjects: s, (n, d_model), and its log probabilities, (n, vocab_size)."""

    def __init__(self, net: Frozen, subjects: Sequence[Subject], layer: int) -> None:
        self.net, self.layer = net, layer
        states, outputs = [], []
        with torch.no_grad():
            for ids, position in subjects:
                found = net.run(net.batch([ids]), read={layer, net.last})
                states.append(found[layer][0, position])
                outputs.append(found[net.last][0, -1])
            self.states = torch.stack(states)
            self.said = log_probabilities(net, torch.stack(outputs))

    def foretold(self, f: Map) -> tuple[float, float]:
        """The share of equal top tokens, and the mean KL(model || f) in nats."""
        with torch.no_grad():
            said = log_probabilities(self.net, f(self.states))
        same = (said.argmax(-1) == self.said.argmax(-1)).double().mean()
        return float(same), float(kl_nats(self.said, said).mean())

    def best_beta(self, slopes: _Slopes, rank: int | None) -> float:
        """That of `BETAS` with which f foretells the model best."""
        unscaled = slopes.map(self.layer, beta=1.0, rank=rank)

        def lost(beta: float) -> float:
            return self.foretold(_on(self.net, unscaled | {"weight": beta * unscaled["weight"]}))[1]

        return min(BETAS, key=lost)

    def score(self, tensors: Mapping[str, torch.Tensor], *, mean: torch.Tensor, beta: float) -> RelationScore:
        """Score f beside s as it is, and beside the one state `mean`."""
        faithfulness, kl = self.foretold(_on(self.net, tensors))
        mean_faithfulness, mean_kl = self.foretold(lambda states: mean.to(states).expand(len(states), -1))
        return RelationScore(
            source_layer=self.layer,
            target_layer=self.net.last,
            beta=beta,
            n_subjects=len(self.states),
            faithfulness=faithfulness,
            kl_nats=kl,
            identity_faithfulness=self.foretold(lambda states: states)[0],
            mean_faithfulness=mean_faithfulness,
            mean_kl_nats=mean_kl,
        )


def _on(net: Frozen, tensors: Mapping[str, torch.Tensor]) -> Map:
    """The map of some tensors, on the model's device."""
    return affine(tensors["weight"].to(net.device), tensors["bias"].to(net.device))
