"""The tuned lens (Belrose et al. 2023, arXiv 2303.08112): translators that predict what the model does.

For layer l, f(h) = h + A h + b, with A and b zero at first. It is trained so that the model's final norm and
unembedding turn f(h) into the model's own final distribution: the loss is KL(model || lens) (section 3).

Two things differ from the authors' training. The data may be a few thousand tokens, so a part of it decides
when to stop, layer by layer; and the optimiser is Adam, one of the two that the authors' code offers. The
first token of a text is left out by default: in most models it is an attention sink, with a huge state that
says little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.fitting.trained.frozen import Frozen, choose_layers, frozen
from patchscope_nn.fitting.trained.kind import LAYERS, MAX_TOKENS, SKIP_FIRST
from patchscope_nn.fitting.trained.last_block import LensKind
from patchscope_nn.fitting.trained.lens import (
    affine_map,
    kl_nats,
    log_probabilities,
    minibatches,
    predict,
    score_lens,
)
from patchscope_nn.fitting.trained.outcome import Outcome, Progress
from patchscope_nn.fitting.trained.splits import split_texts
from patchscope_nn.fitting.trained.training import Training, descend
from patchscope_nn.models import Model

#: About how many tokens' states are held in memory at a time.
_HELD = 16_384
_TRAINING = Training()


class Translator(torch.nn.Module):
    """f(h) = h + A h + b; A (d_model, d_model) and b (d_model,) are zero at first, and in float32."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(d_model, d_model))
        self.bias = torch.nn.Parameter(torch.zeros(d_model))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Translate states, (n, d_model) -> (n, d_model)."""
        return states + torch.nn.functional.linear(states.to(self.bias), self.matrix, self.bias).to(states)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The map as saved: `weight` = I + A and `bias` = b."""
        weight = torch.eye(len(self.bias)).to(self.matrix) + self.matrix.detach()
        return {"weight": weight, "bias": self.bias.detach().clone()}


@checked
def fit_tuned_lens(
    model: Model,
    texts: Sequence[str],
    *,
    layers: Any = "all",
    max_tokens: int = 128,
    skip_first: int = 1,
    training: Training | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train translators from layers to the last block.

    Args:
        model: The model.
        texts: What it reads.
        layers: l, each with l* the last block; for the last block itself nothing can be learned.
        max_tokens: How many tokens of a text are read.
        skip_first: How many tokens at the beginning of a text are left out.
        training: How to train; a batch is of tokens. None trains by default.
        progress: Called with (steps done, steps in total).

    Returns:
        For each (l, last block), `weight` = I + A and `bias` = b; `held_out` is a `LensScore` for each.

    Raises:
        LayerError: A layer lies outside the model.
        DataError: The texts are too few or too short.
        ModelError: What follows the model's last block is not known.
    """
    training = training or _TRAINING
    chosen = choose_layers(model, layers)
    parts = split_texts(
        texts,
        model.tokenizer,
        held_out=training.held_out,
        stopping=training.stopping,
        seed=training.seed,
        max_tokens=max_tokens,
        least=skip_first + KIND.least,
    )
    with frozen(model) as net:
        translators = {layer: Translator(model.info.d_model).to(net.device) for layer in chosen}
        batches = minibatches(
            model,
            parts.fitted,
            sorted({*chosen, net.last}),
            size=training.batch,
            skip_first=skip_first,
            held=_HELD,
            seed=training.seed,
        )

        def score() -> dict[int, float]:
            maps = {layer: [translator] for layer, translator in translators.items()}
            predictions, _ = predict(net, maps, parts.stopping, skip_first=skip_first)
            return {layer: kl for layer, [(kl, _)] in predictions.items()}

        steps = descend(
            translators,
            losses=lambda: _losses(net, translators, next(batches)),
            score=score,
            training=training,
            progress=progress,
        )
        tensors = {layer: translator.tensors() for layer, translator in translators.items()}
        maps = {layer: affine_map(**of_layer) for layer, of_layer in tensors.items()}
        scores = score_lens(net, maps, parts.held_out, skip_first=skip_first)
    return Outcome(
        kind="tuned_lens",
        maps={(layer, model.info.n_layers - 1): of_layer for layer, of_layer in tensors.items()},
        held_out=scores,
        provenance={
            "max_tokens": max_tokens,
            "skip_first": skip_first,
            "training": training.model_dump(),
            "n_texts": parts.counts(),
            "left_at_step": {str(layer): step for layer, step in steps.items()},
        },
    )


def _losses(
    net: Frozen, translators: dict[int, Translator], states: dict[int, torch.Tensor]
) -> Iterator[torch.Tensor]:
    """For each layer, the mean KL(model || lens) over the tokens of a batch."""
    with torch.no_grad():
        own = log_probabilities(net, states[net.last])
    for layer, translator in translators.items():
        yield kl_nats(own, log_probabilities(net, translator(states[layer]))).mean()


KIND = LensKind(
    name="tuned_lens",
    summary="Translators to the last block, trained to predict what the model predicts (arXiv 2303.08112).",
    fit=fit_tuned_lens,
    reads="texts",
    options={"layers": LAYERS, "max_tokens": MAX_TOKENS, "skip_first": SKIP_FIRST},
    training=_TRAINING,
    data="builtin:contexts",
    least=1,
)
