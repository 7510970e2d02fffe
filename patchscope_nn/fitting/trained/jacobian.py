"""The Jacobian lens: maps a layer's states to the last block by the mean Jacobian over a text corpus.

Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models". For layer l,
f(h) = J h. Like the published estimator (github.com/anthropics/jacobian-lens, `jlens/fitting.py`), this one
uses all positions of a text except the first 16 (attention sinks) and the last. For each position p it sums,
over all p' >= p, the Jacobians of the last block's state at p' by layer l's state at p. J is the mean of
these sums over p, and then over texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import DataError
from patchscope_nn.fitting.trained.frozen import Frozen, choose_layers, frozen
from patchscope_nn.fitting.trained.kind import HELD_OUT, LAYERS, MAX_TOKENS, ROWS_AT_A_TIME, SEED, SKIP_FIRST
from patchscope_nn.fitting.trained.last_block import LensKind
from patchscope_nn.fitting.trained.lens import affine_map, score_lens
from patchscope_nn.fitting.trained.outcome import Outcome, Progress
from patchscope_nn.fitting.trained.splits import split_texts
from patchscope_nn.models import Model


class JacobianRows(NamedTuple):
    """Some rows of the Jacobians of the last block's state.

    Attributes:
        rows: Which dimensions of the last block's state are differentiated.
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
    """Differentiate the last block's states by those of earlier layers, some rows at a time.

    There is one forward pass, of `at_a_time` copies of the text. Each backward pass then gives `at_a_time`
    rows of the Jacobians, for all layers at once.

    Args:
        net: The model.
        ids: (n_tokens,) token ids.
        layers: The layers.
        outputs: The positions whose last-block states are summed and differentiated.
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
        gradients = torch.autograd.grad(
            last, [states[layer] for layer in layers], grad_outputs=direction, retain_graph=more
        )
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
    layers: Any = "all",
    max_tokens: int = 128,
    skip_first: int = 16,
    rows_at_a_time: int = 16,
    held_out: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """Average the Jacobians of the last block's states over texts.

    Each text takes one forward pass and d_model / `rows_at_a_time` backward passes.

    Args:
        model: The model.
        texts: What it reads; the authors use 1,000 texts of 128 tokens, and find 100 nearly as good.
        layers: l, each with l* the last block.
        max_tokens: How many tokens of a text are read.
        skip_first: How many tokens at the beginning of a text are left out; the published lenses skip 16.
        rows_at_a_time: How many rows of the Jacobians a backward pass gives.
        held_out: The share of the texts that the lens is scored on.
        seed: Decides which texts these are.
        progress: Called with (texts done, texts in total).

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
    parts = split_texts(
        texts,
        model.tokenizer,
        held_out=held_out,
        seed=seed,
        max_tokens=max_tokens,
        least=skip_first + KIND.least,
    )
    size = model.info.d_model
    means = {layer: torch.zeros(size, size) for layer in chosen}
    with frozen(model) as net:
        for done, ids in enumerate(parts.fitted, start=1):
            used = range(skip_first, len(ids) - 1)
            for part in jacobian_rows(net, ids, layers=chosen, outputs=used, at_a_time=rows_at_a_time):
                for layer, gradients in part.gradients.items():
                    means[layer][part.rows] += gradients[:, used].mean(1).cpu() / len(parts.fitted)
            if progress is not None:
                progress(done, len(parts.fitted))
        maps = {layer: affine_map(mean.to(net.device)) for layer, mean in means.items()}
        scores = score_lens(net, maps, parts.held_out, skip_first=skip_first)
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


KIND = LensKind(
    name="jacobian_lens",
    summary="The mean Jacobian of the last block's states by a layer's, over texts (Gurnee et al. 2026).",
    fit=fit_jacobian_lens,
    reads="texts",
    options={
        "layers": LAYERS,
        "max_tokens": MAX_TOKENS,
        "skip_first": SKIP_FIRST,
        "rows_at_a_time": ROWS_AT_A_TIME,
        "held_out": HELD_OUT,
        "seed": SEED,
    },
    unit="texts",
    bias=False,
    least=2,
)
