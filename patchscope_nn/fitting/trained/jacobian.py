"""The Jacobian lens: maps a layer's states to the last block by the mean Jacobian over a text corpus.

Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models". For layer l,
f(h) = J h. Like the published estimator (github.com/anthropics/jacobian-lens, `jlens/fitting.py`), this one
uses all positions of a text except the first 16 (attention sinks) and the last. For each position p it sums,
over all p' >= p, the Jacobians of the last block's state at p' by layer l's state at p. J is the mean of
these sums over p, and then over texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import DataError
from patchscope_nn.fitting.reporting import Progress, counted
from patchscope_nn.fitting.trained.frozen import Frozen, choose_layers, frozen
from patchscope_nn.fitting.trained.kind import HeldOut, Layers, MaxTokens, RowsAtATime, Seed, SkipFirst
from patchscope_nn.fitting.trained.last_block import LensKind
from patchscope_nn.fitting.trained.lens import lens_outcome
from patchscope_nn.fitting.trained.outcome import Outcome
from patchscope_nn.fitting.trained.splits import split_texts
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.models import Model

_DEFAULT = Training()


class JacobianRows(NamedTuple):
    """Some rows of the Jacobians of the last block's state, that is, some of its dimensions.

    Attributes:
        rows: Which rows.
        states: For each layer (n_tokens, d_model), the states at which the derivative is taken.
        outputs: (n_tokens, d_model), the last block's states.
        gradients: For each layer (n_rows, n_tokens, d_model): the derivative of each dimension, summed over
            the output positions, by the layer's state at every position.
    """

    rows: slice
    states: dict[int, torch.Tensor]
    outputs: torch.Tensor
    gradients: dict[int, torch.Tensor]


def jacobian_rows(
    net: Frozen, ids: Sequence[int], *, layers: Sequence[int], outputs: Sequence[int], at_a_time: int
) -> Iterator[JacobianRows]:
    """Differentiate the last block's states, summed over the positions `outputs`, by those of earlier layers.

    There is one forward pass, of `at_a_time` copies of the text. Each backward pass then gives `at_a_time`
    rows of the Jacobians, for all layers at once.
    """
    size = net.model.info.d_model
    copies = min(at_a_time, size)
    tokens = net.batch([ids] * copies)
    states = net.run(tokens, read=sorted({*layers, net.last}), leaf=min(layers))
    last = states[net.last]
    for start in range(0, size, copies):
        count = min(copies, size - start)
        direction = torch.zeros_like(last)
        for row in range(count):
            direction[row, list(outputs), start + row] = 1.0
        inputs, more = [states[layer] for layer in layers], start + count < size
        gradients = torch.autograd.grad(last, inputs, grad_outputs=direction, retain_graph=more)
        yield JacobianRows(
            rows=slice(start, start + count),
            states={layer: states[layer][0].detach() for layer in layers},
            outputs=last[0].detach(),
            gradients={layer: part[:count].float() for layer, part in zip(layers, gradients, strict=True)},
        )


@checked
def fit_jacobian_lens(
    model: Model,
    texts: Sequence[str],
    *,
    layers: Layers = "all",
    max_tokens: MaxTokens = 128,
    skip_first: SkipFirst = 16,
    rows_at_a_time: RowsAtATime = 16,
    held_out: HeldOut = _DEFAULT.held_out,
    seed: Seed = _DEFAULT.seed,
    progress: Progress | None = None,
) -> Outcome:
    """Average the Jacobians of the last block's states over texts.

    Each text takes one forward pass and d_model / `rows_at_a_time` backward passes. The authors use 1,000
    texts of 128 tokens, find 100 nearly as good, and skip the first 16 tokens of each.

    Returns:
        For each (l, last block), `weight` = J; `held_out` is a `LensScore` for each.

    Raises:
        LayerError: A layer lies outside the model.
        DataError: The texts are too few or too short; or `rows_at_a_time` is below 1.
        ModelError: What follows the model's last block is not known.
    """
    if rows_at_a_time < 1:
        raise DataError(f"rows_at_a_time={rows_at_a_time} is not allowed.", hint="Give 1 or more.")
    chosen = choose_layers(model, layers)
    least, shares = skip_first + KIND.least, {"held_out": held_out, "seed": seed}
    parts = split_texts(texts, model.tokenizer, max_tokens=max_tokens, least=least, **shares)
    size = model.info.d_model
    means = {layer: torch.zeros(size, size) for layer in chosen}
    with frozen(model) as net:
        for ids in counted(parts.fitted, progress):
            used = range(skip_first, len(ids) - 1)
            for part in jacobian_rows(net, ids, layers=chosen, outputs=used, at_a_time=rows_at_a_time):
                for layer, gradients in part.gradients.items():
                    means[layer][part.rows] += gradients[:, used].mean(1).cpu() / len(parts.fitted)
        maps = {layer: {"weight": mean} for layer, mean in means.items()}
        settings = {"max_tokens": max_tokens, **shares}
        return lens_outcome(net, maps, parts, kind="jacobian_lens", skip_first=skip_first, **settings)


KIND = LensKind(
    name="jacobian_lens",
    summary="The mean Jacobian of the last block's states by a layer's, over texts (Gurnee et al. 2026).",
    fit=fit_jacobian_lens,
    reads="texts",
    unit="texts",
    bias=False,
    least=2,
)
