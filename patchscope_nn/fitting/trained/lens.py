"""Reading, sampling and scoring for lenses: maps to the last block, whose states the model unembeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from patchscope_nn.fitting.reading import Row, read_rows
from patchscope_nn.fitting.trained.frozen import Frozen
from patchscope_nn.fitting.trained.outcome import Outcome
from patchscope_nn.fitting.trained.splits import Parts
from patchscope_nn.mappings import Parts as Tensors
from patchscope_nn.models import Model

Ids: TypeAlias = tuple[int, ...]
Map: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

#: About how many tokens' states are held at a time while a lens is trained.
_HELD = 16_384
#: About how many tokens' states are held at a time while a lens is scored.
_SCORED = 2048
#: How many tokens are unembedded at a time.
_UNEMBEDDED = 256


@dataclass(frozen=True, kw_only=True)
class LensScore:
    """How well a lens predicts the model's own next-token distribution, on tokens it was not fitted on.

    Attributes:
        source_layer: l.
        target_layer: l*, the last block.
        n_tokens: The number of tokens scored.
        kl_nats: The mean of KL(model || lens).
        agreement: The share of tokens for which lens and model have the same top token.
        logit_lens_kl_nats: The mean KL for the unmapped states.
        logit_lens_agreement: The agreement for the unmapped states.
    """

    source_layer: int
    target_layer: int
    n_tokens: int
    kl_nats: float
    agreement: float
    logit_lens_kl_nats: float
    logit_lens_agreement: float


def minibatches(
    model: Model, sequences: Sequence[Ids], layers: Sequence[int], *, size: int, skip_first: int, seed: int
) -> Iterator[dict[int, torch.Tensor]]:
    """Endlessly yield the states of tokens drawn at random, for each layer (n, d_model) with n <= `size`.

    The states of some texts are read and held at a time; if these are all the texts, they are read once.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    groups = _groups([sequences[index] for index in order], _HELD)
    states: dict[int, torch.Tensor] = {}
    while True:
        for group in groups:
            if not states or len(groups) > 1:
                states = _read_states(model, group, layers, skip_first=skip_first)
            tokens = torch.randperm(len(states[layers[0]]), generator=generator)
            for batch in tokens.split(size):
                yield {layer: of_layer[batch.to(of_layer.device)] for layer, of_layer in states.items()}


def lens_outcome(
    net: Frozen, maps: Mapping[int, Tensors], parts: Parts[Ids], *, kind: str, skip_first: int, **more: Any
) -> Outcome:
    """Score a lens and the logit lens on the held-out texts; `more` is added to the lens's provenance."""
    with_plain = {
        layer: (affine_map(tensors, net.device), lambda states: states) for layer, tensors in maps.items()
    }
    predictions, count = predict(net, with_plain, parts.held_out, skip_first=skip_first)
    scores = tuple(
        LensScore(
            source_layer=layer,
            target_layer=net.last,
            n_tokens=count,
            kl_nats=kl,
            agreement=agreement,
            logit_lens_kl_nats=plain_kl,
            logit_lens_agreement=plain_agreement,
        )
        for layer, ((kl, agreement), (plain_kl, plain_agreement)) in predictions.items()
    )
    return Outcome(
        kind=kind,
        maps={(layer, net.last): tensors for layer, tensors in maps.items()},
        held_out=scores,
        provenance={"skip_first": skip_first, "n_texts": parts.counts(), **more},
    )


def predict(
    net: Frozen, maps: Mapping[int, Sequence[Map]], sequences: Sequence[Ids], *, skip_first: int
) -> tuple[dict[int, list[tuple[float, float]]], int]:
    """Compare what is unembedded from mapped states with the model's own prediction.

    Returns:
        For each layer and each of its maps, the mean KL(model || map) in nats and the share of equal top
        tokens; and the number of tokens.
    """
    sums = {layer: torch.zeros(len(of_layer), 2, dtype=torch.float64) for layer, of_layer in maps.items()}
    count = 0
    for group in _groups(sequences, _SCORED):
        states = _read_states(net.model, group, list({*maps, net.last}), skip_first=skip_first)
        for tokens in torch.arange(len(states[net.last])).split(_UNEMBEDDED):
            count += len(tokens)
            with torch.no_grad():
                own = log_probabilities(net, states[net.last][tokens])
                for layer, of_layer in maps.items():
                    for index, f in enumerate(of_layer):
                        kl, same = compare(own, log_probabilities(net, f(states[layer][tokens])))
                        sums[layer][index] += torch.stack([kl.sum(), same.sum()]).double().cpu()
    means = {layer: (total / count).tolist() for layer, total in sums.items()}
    return {layer: [(kl, same) for kl, same in numbers] for layer, numbers in means.items()}, count


def affine_map(tensors: Tensors, device: Any) -> Map:
    """The map h -> W h + b of `weight` and optionally `bias`, which keeps a state's dtype and device."""
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    weight = on_device["weight"]
    return lambda states: torch.nn.functional.linear(states.to(weight), **on_device).to(states)


def log_probabilities(net: Frozen, states: torch.Tensor) -> torch.Tensor:
    """The prediction from states of the last block: (..., d_model) -> (..., vocab_size), in float32."""
    return net.unembed(states).float().log_softmax(-1)


def kl_nats(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(own || other) of log probabilities, (..., vocab_size) -> (...)."""
    return (own.exp() * (own - other)).sum(-1)


def compare(own: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(own || other) in nats, and whether both have the same top token; (..., vocab_size) -> (...)."""
    return kl_nats(own, other), own.argmax(-1) == other.argmax(-1)


def _read_states(
    model: Model, sequences: Sequence[Ids], layers: Sequence[int], *, skip_first: int
) -> dict[int, torch.Tensor]:
    """For each layer (n_tokens, d_model), without the first few tokens of each sequence."""
    rows = [Row(ids, range(skip_first, len(ids))) for ids in sequences]
    return {layer: torch.cat(states) for layer, states in read_rows(rows, layers, model).items()}


def _groups(sequences: Sequence[Ids], tokens: int) -> list[list[Ids]]:
    """Consecutive sequences, in groups that end once they have `tokens` tokens."""
    groups: list[list[Ids]] = [[]]
    for ids in sequences:
        if sum(map(len, groups[-1])) >= tokens:
            groups.append([])
        groups[-1].append(ids)
    return groups
