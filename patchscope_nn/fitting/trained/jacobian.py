"""The Jacobian lens: a layer's states, carried to the last block by the mean Jacobian over a text corpus.

Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models". For layer l,
f(h) = J h. The published estimator (github.com/anthropics/jacobian-lens, `jlens/fitting.py`), and so this
one, takes a text's positions but for the first 16 (attention sinks) and the last. For each p of them it sums
over the p' >= p of them the Jacobians of the last block's state at p' by layer l's state at p; J is the mean
of these sums over p, and then over texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import DataError
from patchscope_nn.fitting.trained.frozen import Frozen, choose_layers, frozen
from patchscope_nn.fitting.trained.held_out import deal_texts
from patchscope_nn.fitting.trained.lens import affine, score_lens
from patchscope_nn.fitting.trained.outcome import Outcome, Progress
from patchscope_nn.models import Model

#: How many positions at a text's beginning the published lenses leave out.
SKIP_FIRST = 16


class Rows(NamedTuple):
    """Some rows of Jacobians of the last block's state.

    Attributes:
        rows: Which of its d_model numbers are differentiated.
        states: For each layer, (n_tokens, d_model): the states the derivative is taken at.
        outputs: (n_tokens, d_model): the last block's states.
        gradients: For each layer, (n_rows, n_tokens, d_model): the derivative of each number, summed over
            the chosen positions, by the layer's state at every position.
    """

    rows: slice
    states: dict[int, torch.Tensor]
    outputs: torch.Tensor
    gradients: dict[int, torch.Tensor]


def jacobian_rows(
    net: Frozen, ids: Sequence[int], *, layers: Sequence[int], outputs: Sequence[int], at_a_time: int
) -> Iterator[Rows]:
    """Differentiate the last block's states by those of layers before it, some rows at a time.

    One forward pass of `at_a_time` equal rows serves all; each backward pass gives as many rows of the
    Jacobians, of all layers at once.

    Args:
        net: The model.
        ids: (n_tokens,) the text.
        layers: The layers.
        outputs: The positions of the last block whose states are summed and differentiated.
        at_a_time: How many rows a backward pass gives.

    Yields:
        The rows, from the first to the last.
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
        more = start + count < size
        found = torch.autograd.grad(
            last, [states[layer] for layer in layers], grad_outputs=direction, retain_graph=more
        )
        yield Rows(
            rows=slice(start, start + count),
            states={layer: states[layer][0].detach() for layer in layers},
            outputs=last[0].detach(),
            gradients={layer: part[:count].float() for layer, part in zip(layers, found, strict=True)},
        )


@checked
def fit_jacobian_lens(
    model: Model,
    texts: Sequence[str],
    *,
    layers: Any = "all",
    max_tokens: int = 128,
    skip_first: int = SKIP_FIRST,
    rows_at_a_time: int = 16,
    held_out: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """Average the Jacobians of the last block's states over texts.

    A text costs one forward pass and d_model / `rows_at_a_time` backward passes, of `rows_at_a_time` rows.

    Args:
        model: The model.
        texts: What it reads; the authors use 1,000 of 128 tokens, and find 100 nearly as good.
        layers: l, each with l* the last block.
        max_tokens: How many tokens of a text are read.
        skip_first: How many tokens at a text's beginning are left out. The published lenses leave out 16.
        rows_at_a_time: How many rows of the Jacobians a backward pass gives.
        held_out: The share of the texts the lens is scored on.
        seed: Decides which.
        progress: Called with (texts done, texts in all).

    Returns:
        For each (l, last block), `weight` = J; `held_out` is a `LensScore` for each.

    Raises:
        LayerError: A layer lies outside the model.
        DataError: The texts are too few or too short; or `rows_at_a_time` is below 1.
        ModelError: What follows the model's last block is not known.
    """
    if rows_at_a_time < 1:
        raise DataError(f"rows_at_a_time={rows_at_a_time} leaves no row.", hint="Give 1 or more.")
    chosen = choose_layers(model, layers)
    parts = deal_texts(
        texts,
        model.tokenizer,
        held_out=held_out,
        seed=seed,
        max_tokens=max_tokens,
        least=skip_first + 2,
    )
    size = model.info.d_model
    means = {layer: torch.zeros(size, size) for layer in chosen}
    with frozen(model) as net:
        for done, ids in enumerate(parts.fitted, start=1):
            used = range(skip_first, len(ids) - 1)
            for found in jacobian_rows(net, ids, layers=chosen, outputs=used, at_a_time=rows_at_a_time):
                for layer, gradients in found.gradients.items():
                    means[layer][found.rows] += gradients[:, used].mean(1).cpu() / len(parts.fitted)
            if progress is not None:
                progress(done, len(parts.fitted))
        scores = score_lens(
            net,
            {layer: affine(mean.to(net.device)) for layer, mean in means.items()},
            parts.held_out,
            skip_first=skip_first,
        )
    return Outcome(
        kind="jacobian_lens",
        maps={(layer, model.info.n_layers - 1): {"weight": mean} for layer, mean in means.items()},
        held_out=scores,
        provenance={
            "max_tokens": max_tokens,
            "skip_first": skip_first,
            "held_out": held_out,
            "seed": seed,
            "n_texts": parts.counts(),
        },
    )
