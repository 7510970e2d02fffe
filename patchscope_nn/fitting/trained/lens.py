"""Reading, sampling and scoring for lenses: maps to the last block, whose states the model unembeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from patchscope_nn.fitting.reading import Row, read_rows
from patchscope_nn.fitting.trained.frozen import Frozen
from patchscope_nn.models import Model

States: TypeAlias = torch.Tensor
Map: TypeAlias = Callable[[States], States]

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


def read_states(
    model: Model, sequences: Sequence[tuple[int, ...]], layers: Sequence[int], *, skip_first: int
) -> dict[int, States]:
    """The states of all tokens of some sequences, without the first few of each.

    Args:
        model: The model.
        sequences: Token ids.
        layers: The layers to read.
        skip_first: How many tokens at the beginning of a sequence are left out.

    Returns:
        For each layer (n_tokens, d_model), in the order of the sequences.
    """
    rows = [Row(ids, range(skip_first, len(ids))) for ids in sequences]
    return {layer: torch.cat(states) for layer, states in read_rows(rows, layers, model).items()}


def minibatches(
    model: Model,
    sequences: Sequence[tuple[int, ...]],
    layers: Sequence[int],
    *,
    size: int,
    skip_first: int,
    held: int,
    seed: int,
) -> Iterator[dict[int, States]]:
    """Endlessly yield the states of `size` tokens drawn at random.

    Args:
        model: The model.
        sequences: Token ids.
        layers: The layers to read.
        size: How many tokens at a time.
        skip_first: As in `read_states`.
        held: About how many tokens' states are held at a time; if that is all of them, they are read once.
        seed: Decides the order.

    Yields:
        For each layer (n, d_model), n <= size.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    groups = _groups([sequences[index] for index in order], held)
    states: dict[int, States] = {}
    while True:
        for group in groups:
            if not states or len(groups) > 1:
                states = read_states(model, group, layers, skip_first=skip_first)
            tokens = torch.randperm(len(states[layers[0]]), generator=generator)
            for batch in tokens.split(size):
                yield {layer: of_layer[batch.to(of_layer.device)] for layer, of_layer in states.items()}


def score_lens(
    net: Frozen, maps: Mapping[int, Map], sequences: Sequence[tuple[int, ...]], *, skip_first: int
) -> tuple[LensScore, ...]:
    """Score maps to the last block, beside the logit lens.

    Args:
        net: The model.
        maps: For each layer, its map; (n, d_model) -> (n, d_model).
        sequences: Token ids of held-out texts.
        skip_first: As in `read_states`.

    Returns:
        One score for each layer.
    """
    with_plain = {layer: (f, lambda states: states) for layer, f in maps.items()}
    predictions, count = predict(net, with_plain, sequences, skip_first=skip_first)
    return tuple(
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


def predict(
    net: Frozen,
    maps: Mapping[int, Sequence[Map]],
    sequences: Sequence[tuple[int, ...]],
    *,
    skip_first: int,
) -> tuple[dict[int, list[tuple[float, float]]], int]:
    """Compare what is unembedded from mapped states with the model's own prediction.

    Args:
        net: The model.
        maps: For each layer, the maps to compare.
        sequences: Token ids.
        skip_first: As in `read_states`.

    Returns:
        For each layer and map, the mean KL(model || map) in nats and the share of equal top tokens; and the
        number of tokens.
    """
    sums = {layer: torch.zeros(len(of_layer), 2, dtype=torch.float64) for layer, of_layer in maps.items()}
    count = 0
    for group in _groups(sequences, _SCORED):
        states = read_states(net.model, group, list({*maps, net.last}), skip_first=skip_first)
        for tokens in torch.arange(len(states[net.last])).split(_UNEMBEDDED):
            count += len(tokens)
            with torch.no_grad():
                own = log_probabilities(net, states[net.last][tokens])
                for layer, of_layer in maps.items():
                    for index, f in enumerate(of_layer):
                        mapped = log_probabilities(net, f(states[layer][tokens]))
                        same = (own.argmax(-1) == mapped.argmax(-1)).sum()
                        numbers = torch.stack([kl_nats(own, mapped).sum(), same])
                        sums[layer][index] += numbers.double().cpu()
    means = {layer: (total / count).tolist() for layer, total in sums.items()}
    return {layer: [(kl, same) for kl, same in numbers] for layer, numbers in means.items()}, count


def affine_map(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Map:
    """The map h -> W h + b, which keeps a state's dtype and device."""

    def f(states: States) -> States:
        return torch.nn.functional.linear(states.to(weight), weight, bias).to(states)

    return f


def log_probabilities(net: Frozen, states: States) -> torch.Tensor:
    """The prediction from states of the last block: (..., d_model) -> (..., vocab_size), in float32."""
    return net.unembed(states).float().log_softmax(-1)


def kl_nats(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(own || other) of log probabilities, (..., vocab_size) -> (...)."""
    return (own.exp() * (own - other)).sum(-1)


def _groups(sequences: Sequence[tuple[int, ...]], tokens: int) -> list[list[tuple[int, ...]]]:
    """Consecutive sequences, in groups that end once they have `tokens` tokens."""
    groups: list[list[tuple[int, ...]]] = [[]]
    for ids in sequences:
        if sum(map(len, groups[-1])) >= tokens:
            groups.append([])
        groups[-1].append(ids)
    return groups
