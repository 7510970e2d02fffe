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

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.fitting.reporting import Progress
from patchscope_nn.fitting.trained.frozen import choose_layers, frozen
from patchscope_nn.fitting.trained.kind import Layers, MaxTokens, SkipFirst
from patchscope_nn.fitting.trained.last_block import LensKind
from patchscope_nn.fitting.trained.lens import kl_nats, lens_outcome, log_probabilities, minibatches, predict
from patchscope_nn.fitting.trained.outcome import Outcome
from patchscope_nn.fitting.trained.splits import split_texts
from patchscope_nn.fitting.trained.training import Training, descend
from patchscope_nn.models import Model

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
    layers: Layers = "all",
    max_tokens: MaxTokens = 128,
    skip_first: SkipFirst = 1,
    training: Training | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train translators from layers to the last block; `training.batch` counts tokens.

    For the last block itself nothing can be learned.

    Returns:
        For each (l, last block), `weight` = I + A and `bias` = b; `held_out` is a `LensScore` for each.

    Raises:
        LayerError: A layer lies outside the model.
        DataError: The texts are too few or too short.
        ModelError: What follows the model's last block is not known.
    """
    training = training or _TRAINING
    chosen = choose_layers(model, layers)
    least = skip_first + KIND.least
    parts = split_texts(texts, model.tokenizer, max_tokens=max_tokens, least=least, **training.shares)
    with frozen(model) as net:
        translators = {layer: Translator(model.info.d_model).to(net.device) for layer in chosen}
        read = sorted({*chosen, net.last})
        drawn = {"size": training.batch, "skip_first": skip_first, "seed": training.seed}
        batches = minibatches(model, parts.fitted, read, **drawn)

        def losses() -> Iterator[torch.Tensor]:
            states = next(batches)
            with torch.no_grad():
                own = log_probabilities(net, states[net.last])
            for layer, translator in translators.items():
                yield kl_nats(own, log_probabilities(net, translator(states[layer]))).mean()

        def score() -> dict[int, float]:
            maps = {layer: [translator] for layer, translator in translators.items()}
            predictions, _ = predict(net, maps, parts.stopping, skip_first=skip_first)
            return {layer: kl for layer, [(kl, _)] in predictions.items()}

        steps = descend(translators, losses=losses, score=score, training=training, progress=progress)
        return lens_outcome(
            net,
            {layer: translator.tensors() for layer, translator in translators.items()},
            parts,
            kind="tuned_lens",
            max_tokens=max_tokens,
            skip_first=skip_first,
            training=training.model_dump(),
            left_at_step={str(layer): step for layer, step in steps.items()},
        )


KIND = LensKind(
    name="tuned_lens",
    summary="Translators to the last block, trained to predict what the model predicts (arXiv 2303.08112).",
    fit=fit_tuned_lens,
    reads="texts",
    training=_TRAINING,
    data="builtin:contexts",
    least=1,
)
