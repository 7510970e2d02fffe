"""Soft prompts (Future Lens, Pal et al. 2023, arXiv 2311.04897): a target prompt of learned embeddings.

T is k tokens whose states at the input of block 0 are learned. The state h of a text's token t at layer l is
written at the last of them at layer l* = l, and the text's own tokens follow. The model should then predict
the same as in the text: the loss is KL(model on the text || model on T) after token t + n, averaged over the
offsets n (n = 0 predicts the next token), as in the authors' code (github.com/KoyenaPal/future-lens,
`causal_methods/module.py`). The prompt starts as random tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import DataError, LayerError
from patchscope_nn.fitting.reading import Row, read_rows
from patchscope_nn.fitting.reporting import Progress
from patchscope_nn.fitting.trained.frozen import Frozen, Write, choose_layers, frozen
from patchscope_nn.fitting.trained.kind import MaxTokens, Option, SkipFirst, TrainedKind
from patchscope_nn.fitting.trained.lens import compare, kl_nats, log_probabilities
from patchscope_nn.fitting.trained.outcome import FittedPrompt
from patchscope_nn.fitting.trained.splits import split_texts
from patchscope_nn.fitting.trained.training import Training, descend
from patchscope_nn.mappings import Provenance, Space
from patchscope_nn.models import Model
from patchscope_nn.spec.layers import EMBED

#: How many states a forward pass scores.
_BATCH = 16
_TRAINING = Training(learning_rate=0.01, batch=16)


@dataclass(frozen=True, kw_only=True)
class FutureScore:
    """How well T predicts the model n tokens after a state, on texts it was not trained on.

    Attributes:
        layer: l, and l*.
        offset: n; 0 is the next token.
        n_states: The number of states scored.
        kl_nats: The mean of KL(model on the text || model on T).
        agreement: The share for which both have the same top token.
        untrained_kl_nats: The KL with the prompt before training.
        untrained_agreement: The agreement with the prompt before training.
        shuffled_kl_nats: The KL with the state of another text, one that was trained on.
        shuffled_agreement: The agreement with the state of another text.
    """

    layer: int
    offset: int
    n_states: int
    kl_nats: float
    agreement: float
    untrained_kl_nats: float
    untrained_agreement: float
    shuffled_kl_nats: float
    shuffled_agreement: float


class _States(NamedTuple):
    """States of texts, the text that follows each, and what the model predicts from it."""

    states: torch.Tensor  # (n, 1, d_model), h at layer l
    following: torch.Tensor  # (n, largest offset), the text's tokens after it
    outputs: torch.Tensor  # (n, n_offsets, d_model), the last block's states on the text at each offset


@checked
def fit_soft_prompt(
    model: Model,
    texts: Sequence[str],
    *,
    layer: Annotated[Any, Option("l, and l*: one layer.", selector=True)],
    tokens: Annotated[int, Option("k, the prompt's length.", 1)] = 10,
    offsets: Annotated[
        Sequence[int], Option("The tokens to predict: 0 is the next, [0, 1] the next two.", selector=True)
    ] = (0, 1),
    max_tokens: MaxTokens = 128,
    skip_first: SkipFirst = 1,
    training: Training | None = None,
    progress: Progress | None = None,
) -> FittedPrompt:
    """Learn a target prompt that makes the model predict from a state what it predicts in the text.

    `training.batch` counts states. The prompt is trained for all `offsets` together.

    Returns:
        The prompt, scored for each offset.

    Raises:
        LayerError: The layer lies outside the model, or several are given.
        DataError: The texts are too few or too short, or `tokens` or `offsets` is out of range.
        ModelError: What follows the model's last block is not known.
    """
    training = training or _TRAINING
    chosen = _one_layer(model, layer)
    if tokens < 1 or not offsets or min(offsets) < 0:
        raise DataError(
            f"tokens={tokens} and offsets={list(offsets)} leave nothing to learn.",
            hint="Give 1 token or more, and offsets from 0 (the next token).",
        )
    settings: dict[str, Any] = {"layer": chosen, "tokens": tokens, "offsets": sorted(set(offsets))}
    least = skip_first + max(offsets) + 1
    parts = split_texts(texts, model.tokenizer, max_tokens=max_tokens, least=least, **training.shares)
    with frozen(model) as net:
        course = _Course(net, **settings)
        fitted, held_out = (
            course.read(part, skip_first=skip_first) for part in (parts.fitted, parts.held_out)
        )
        stopping = course.read(parts.stopping, skip_first=skip_first) if parts.stopping else None
        start = course.start(training.seed)
        prompt = torch.nn.ParameterList([start.clone()])
        step = course.train(prompt, fitted, stopping, training=training, progress=progress)
        learned = prompt[0].detach().clone()
        scores = course.score(learned, start, held_out, other=fitted)
    settings |= {"max_tokens": max_tokens, "skip_first": skip_first, "training": training.model_dump()}
    about = Provenance(
        source_model=Space.of(model.info),
        target_model=Space.of(model.info),
        settings=settings | {"n_texts": parts.counts(), "left_at_step": step},
        held_out={(chosen, chosen): _numbers(scores)},
        seed=training.seed,
    )
    return FittedPrompt(soft_prompt=learned, held_out=scores, about=about)


def _one_layer(model: Model, layer: Any) -> int:
    layers = choose_layers(model, layer)
    if len(layers) != 1:
        raise LayerError(
            f"layer={layer!r} names {len(layers)} layers; a soft prompt is learned for one.",
            hint="Give one layer, and fit another prompt for the next.",
        )
    return layers[0]


def _numbers(scores: Sequence[FutureScore]) -> dict[str, float]:
    """All scores by name, for example `kl_nats_0` for offset 0."""
    return {
        f"{name}_{score.offset}": value
        for score in scores
        for name, value in asdict(score).items()
        if name not in ("layer", "offset")
    }


class _Course:
    """The training of one prompt."""

    def __init__(self, net: Frozen, *, layer: int, tokens: int, offsets: list[int]) -> None:
        self.net, self.layer, self.tokens, self.offsets = net, layer, tokens, offsets

    def start(self, seed: int) -> torch.Tensor:
        """The states of k random tokens at the input of block 0, (k, d_model)."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(len(self.net.model.tokenizer), (self.tokens,), generator=generator).tolist()
        return read_rows([Row(tuple(ids), range(self.tokens))], [EMBED], self.net.model)[EMBED][0].float()

    def read(self, sequences: Sequence[tuple[int, ...]], *, skip_first: int) -> _States:
        """Read the states of every token that enough tokens follow."""
        states, following, outputs = [], [], []
        most = self.offsets[-1]
        rows = [Row(ids, range(skip_first, len(ids))) for ids in sequences]
        read = read_rows(rows, {self.layer, self.net.last}, self.net.model)
        for ids, of_layer, of_last in zip(sequences, read[self.layer], read[self.net.last], strict=True):
            for index, t in enumerate(range(skip_first, len(ids) - most)):
                states.append(of_layer[index : index + 1])
                following.append(list(ids[t + 1 : t + 1 + most]))
                outputs.append(of_last[[index + offset for offset in self.offsets]])
        return _States(torch.stack(states), torch.tensor(following, dtype=torch.long), torch.stack(outputs))

    def predict(self, prompt: torch.Tensor, states: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """The model's prediction on T at each offset: (n, n_offsets, vocab_size) log probabilities."""
        count, k = len(states), self.tokens
        tokens = self.net.batch([[*([0] * k), *row] for row in following.tolist()])
        writes = [
            Write(layer=EMBED, positions=[range(k)] * count, states=prompt.expand(count, -1, -1)),
            Write(layer=self.layer, positions=[[k - 1]] * count, states=states),
        ]
        last = self.net.run(tokens, read={self.net.last}, writes=writes)[self.net.last]
        return log_probabilities(self.net, last[:, [k - 1 + offset for offset in self.offsets]])

    def train(
        self,
        prompt: torch.nn.ParameterList,
        fitted: _States,
        stopping: _States | None,
        *,
        training: Training,
        progress: Progress | None,
    ) -> int:
        """Train a prompt, and return the step whose weights it has."""
        generator = torch.Generator().manual_seed(training.seed)

        def losses() -> Iterator[torch.Tensor]:
            batch = torch.randperm(len(fitted.states), generator=generator)[: training.batch]
            states, following, outputs = (part[batch] for part in fitted)
            with torch.no_grad():
                own = log_probabilities(self.net, outputs)
            yield kl_nats(own, self.predict(prompt[0], states, following)).mean()

        def score() -> dict[str, float]:
            return {"prompt": float(self.compare(prompt[0], stopping)[0].mean()) if stopping else 0.0}

        steps = descend({"prompt": prompt}, losses=losses, score=score, training=training, progress=progress)
        return steps["prompt"]

    def compare(self, prompt: torch.Tensor, data: _States) -> tuple[torch.Tensor, torch.Tensor]:
        """For each offset, the mean KL in nats, and the share of equal top tokens."""
        numbers = []
        for batch in torch.arange(len(data.states)).split(_BATCH):
            states, following, outputs = (part[batch] for part in data)
            with torch.no_grad():
                own, on_prompt = log_probabilities(self.net, outputs), self.predict(prompt, states, following)
            kl, same = compare(own, on_prompt)
            numbers.append(torch.stack([kl, same.float()]))
        kl, same = torch.cat(numbers, dim=1).double().mean(1)
        return kl, same

    def score(
        self, prompt: torch.Tensor, start: torch.Tensor, held: _States, *, other: _States
    ) -> tuple[FutureScore, ...]:
        """Score a prompt, its start, and the prompt with the states of other texts."""
        indices = torch.arange(len(held.states)) % len(other.states)
        shuffled = held._replace(states=other.states[indices])
        trials = {"": (prompt, held), "untrained_": (start, held), "shuffled_": (prompt, shuffled)}
        compared = {prefix: self.compare(*trial) for prefix, trial in trials.items()}
        return tuple(
            FutureScore(
                layer=self.layer,
                offset=offset,
                n_states=len(held.states),
                **{
                    f"{prefix}{name}": float(numbers[index])
                    for prefix, pair in compared.items()
                    for name, numbers in zip(("kl_nats", "agreement"), pair, strict=True)
                },
            )
            for index, offset in enumerate(self.offsets)
        )


KIND = TrainedKind(
    name="soft_prompt",
    summary="A learned target prompt with which the model says what a state predicts (arXiv 2311.04897).",
    fit=fit_soft_prompt,
    reads="texts",
    training=_TRAINING,
    data="builtin:contexts",
)
