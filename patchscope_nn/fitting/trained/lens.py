"""Lenses: maps from a layer's states to the last block's, which the model's own unembedding then reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from patchscope_nn.fitting.trained.frozen import Frozen

States: TypeAlias = torch.Tensor
Map: TypeAlias = Callable[[States], States]

#: Sequences of a forward pass, and tokens that are unembedded at a time.
_BATCH = 16
_UNEMBEDDED = 256


@dataclass(frozen=True, kw_only=True)
class LensScore:
    """How well a lens foretells the model's own next-token distribution, on tokens it was not fitted on.

    Attributes:
        source_layer: l.
        target_layer: l*, the last block.
        n_tokens: How many tokens were scored.
        kl_nats: The mean of KL(model || lens).
        agreement: The share of tokens whose top token is the model's.
        logit_lens_kl_nats: The same of the states unmapped.
        logit_lens_agreement: The same of the states unmapped.
    """

    source_layer: int
    target_layer: int
    n_tokens: int
    kl_nats: float
    agreement: float
    logit_lens_kl_nats: float
    logit_lens_agreement: float


def read_states(
    net: Frozen, sequences: Sequence[Sequence[int]], layers: Sequence[int], *, skip_first: int = 0
) -> dict[int, States]:
    """The states of all tokens of some sequences, in order, but for the first few of each.

    Args:
        net: The model.
        sequences: Token ids.
        layers: Which layers.
        skip_first: How many tokens at a sequence's beginning are left out.

    Returns:
        For each layer, (n_tokens, d_model).
    """
    found: dict[int, list[States]] = {layer: [] for layer in layers}
    for start in range(0, len(sequences), _BATCH):
        tokens = net.batch(sequences[start : start + _BATCH])
        with torch.no_grad():
            states = net.run(tokens, read=layers)
        own = tokens.mask.bool()
        own[:, :skip_first] = False
        for layer in layers:
            found[layer].append(states[layer][own])
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def minibatches(
    net: Frozen,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    size: int,
    skip_first: int,
    held: int,
    seed: int,
) -> Iterator[dict[int, States]]:
    """Without end, the states of `size` tokens drawn at random.

    Args:
        net: The model.
        sequences: Token ids.
        layers: Which layers.
        size: How many tokens at a time.
        skip_first: As in `read_states`.
        held: About how many tokens' states are held at a time; where this is all, they are read once.
        seed: Decides the order.

    Yields:
        For each layer, (n, d_model), n <= size.
    """
    generator = torch.Generator().manual_seed(seed)
    groups: list[list[Sequence[int]]] = [[]]
    for number in torch.randperm(len(sequences), generator=generator).tolist():
        if sum(map(len, groups[-1])) >= held:
            groups.append([])
        groups[-1].append(sequences[number])
    bank: dict[int, States] = {}
    while True:
        for group in groups:
            if not bank or len(groups) > 1:
                bank = read_states(net, group, layers, skip_first=skip_first)
            order = torch.randperm(len(bank[layers[0]]), generator=generator)
            for chosen in order.split(size):
                yield {layer: states[chosen.to(states.device)] for layer, states in bank.items()}


def score_lens(
    net: Frozen, maps: Mapping[int, Map], sequences: Sequence[Sequence[int]], *, skip_first: int
) -> tuple[LensScore, ...]:
    """Score maps to the last block, and the logit lens beside them.

    Args:
        net: The model.
        maps: For each layer, its map; (n, d_model) -> (n, d_model).
        sequences: Token ids, of texts that nothing was fitted on.
        skip_first: As in `read_states`.

    Returns:
        One score for each layer.
    """
    mapped, count = foretell(net, maps, sequences, skip_first=skip_first)
    plain, _ = foretell(net, dict.fromkeys(maps, lambda states: states), sequences, skip_first=skip_first)
    return tuple(
        LensScore(
            source_layer=layer,
            target_layer=net.last,
            n_tokens=count,
            kl_nats=mapped[layer][0],
            agreement=mapped[layer][1],
            logit_lens_kl_nats=plain[layer][0],
            logit_lens_agreement=plain[layer][1],
        )
        for layer in maps
    )


def foretell(
    net: Frozen, maps: Mapping[int, Map], sequences: Sequence[Sequence[int]], *, skip_first: int
) -> tuple[dict[int, tuple[float, float]], int]:
    """For each layer the mean KL(model || lens) in nats and the share of equal top tokens; of how many."""
    sums = {layer: torch.zeros(2, dtype=torch.float64) for layer in maps}
    count = 0
    for start in range(0, len(sequences), _BATCH):
        group = sequences[start : start + _BATCH]
        bank = read_states(net, group, list({*maps, net.last}), skip_first=skip_first)
        for chosen in torch.arange(len(bank[net.last])).split(_UNEMBEDDED):
            count += len(chosen)
            with torch.no_grad():
                own = log_probabilities(net, bank[net.last][chosen])
                for layer, f in maps.items():
                    said = log_probabilities(net, f(bank[layer][chosen]))
                    kl, same = kl_nats(own, said).sum(), (own.argmax(-1) == said.argmax(-1)).sum()
                    sums[layer] += torch.stack([kl, same]).double().cpu()
    means = {layer: (total / count).tolist() for layer, total in sums.items()}
    return {layer: (kl, same) for layer, (kl, same) in means.items()}, count


def affine(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Map:
    """The map h -> W h + b, which keeps a state's dtype and device."""

    def f(states: States) -> States:
        return torch.nn.functional.linear(states.to(weight), weight, bias).to(states)

    return f


def log_probabilities(net: Frozen, states: States) -> torch.Tensor:
    """What the model says of states of its last block: (..., d_model) -> (..., vocab_size), in float32."""
    return net.unembed(states).float().log_softmax(-1)


def kl_nats(own: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """KL(own || said) of log probabilities, (..., vocab_size) -> (...)."""
    return (own.exp() * (own - said)).sum(-1)
