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
from typing import Any, NamedTuple

import torch

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import DataError, LayerError
from patchscope_nn.fitting.reading import Row, read_rows
from patchscope_nn.fitting.trained.frozen import Frozen, Write, choose_layers, frozen
from patchscope_nn.fitting.trained.kind import MAX_TOKENS, SKIP_FIRST, Option, TrainedKind
from patchscope_nn.fitting.trained.lens import kl_nats, log_probabilities
from patchscope_nn.fitting.trained.outcome import FittedPrompt, Progress
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
    """States of texts, and what the model predicts after each.

    Attributes:
        states: (n, 1, d_model), h at layer l.
        following: (n, largest offset), the text's tokens after it.
        outputs: (n, n_offsets, d_model), the last block's states on the text at each offset.
    """

    states: torch.Tensor
    following: torch.Tensor
    outputs: torch.Tensor


class _SoftPrompt(torch.nn.Module):
    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.states = torch.nn.Parameter(start.clone())


@checked
def fit_soft_prompt(
    model: Model,
    texts: Sequence[str],
    *,
    layer: Any,
    tokens: int = 10,
    offsets: Sequence[int] = (0, 1),
    max_tokens: int = 128,
    skip_first: int = 1,
    training: Training | None = None,
    progress: Progress | None = None,
) -> FittedPrompt:
    """Learn a target prompt that makes the model predict from a state what it predicts in the text.

    Args:
        model: The model.
        texts: What it reads.
        layer: l, and l*: one layer.
        tokens: k, the length of T; the authors use 10.
        offsets: The n that are trained for.
        max_tokens: How many tokens of a text are read.
        skip_first: How many tokens at the beginning of a text are left out.
        training: How to train; a batch is of states. None trains by default.
        progress: Called with (steps done, steps in total).

    Returns:
        The prompt, scored for each offset.

    Raises:
        LayerError: The layer lies outside the model, or several are given.
        DataError: The texts are too few or too short, or `tokens` or `offsets` is out of range.
        ModelError: What follows the model's last block is not known.
    """
    training = training or _TRAINING
    chosen = choose_layers(model, layer)
    if len(chosen) != 1:
        raise LayerError(
            f"layer={layer!r} names {len(chosen)} layers; a soft prompt is learned for one.",
            hint="Give one layer, and fit another prompt for the next.",
        )
    sorted_offsets = sorted(set(offsets))
    if tokens < 1 or not sorted_offsets or sorted_offsets[0] < 0:
        raise DataError(
            f"tokens={tokens} and offsets={list(offsets)} leave nothing to learn.",
            hint="Give 1 token or more, and offsets from 0 (the next token).",
        )
    parts = split_texts(
        texts,
        model.tokenizer,
        held_out=training.held_out,
        stopping=training.stopping,
        seed=training.seed,
        max_tokens=max_tokens,
        least=skip_first + sorted_offsets[-1] + 1,
    )
    with frozen(model) as net:
        course = _Course(net, layer=chosen[0], tokens=tokens, offsets=sorted_offsets)
        fitted = course.read(parts.fitted, skip_first=skip_first)
        stopping = course.read(parts.stopping, skip_first=skip_first) if parts.stopping else None
        held_out = course.read(parts.held_out, skip_first=skip_first)
        start = course.start(training.seed)
        prompt = _SoftPrompt(start)
        step = course.train(prompt, fitted, stopping, training=training, progress=progress)
        scores = course.score(prompt.states.detach(), start, held_out, other=fitted)
    numbers = {
        f"{name}_{score.offset}": value
        for score in scores
        for name, value in asdict(score).items()
        if name not in ("layer", "offset")
    }
    return FittedPrompt(
        soft_prompt=prompt.states.detach().clone(),
        held_out=scores,
        about=Provenance(
            source_model=Space.of(model.info),
            target_model=Space.of(model.info),
            settings={
                "layer": chosen[0],
                "tokens": tokens,
                "offsets": sorted_offsets,
                "max_tokens": max_tokens,
                "skip_first": skip_first,
                "training": training.model_dump(),
                "n_texts": parts.counts(),
                "left_at_step": step,
            },
            held_out={(chosen[0], chosen[0]): numbers},
            seed=training.seed,
        ),
    )


class _Course:
    """The training of one prompt."""

    def __init__(self, net: Frozen, *, layer: int, tokens: int, offsets: Sequence[int]) -> None:
        self.net, self.layer, self.tokens, self.offsets = net, layer, tokens, list(offsets)

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
        prompt: _SoftPrompt,
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
            yield kl_nats(own, self.predict(prompt.states, states, following)).mean()

        def score() -> dict[str, float]:
            return {"prompt": float(self.compare(prompt.states, stopping)[0].mean()) if stopping else 0.0}

        return descend({"prompt": prompt}, losses=losses, score=score, training=training, progress=progress)[
            "prompt"
        ]

    def compare(self, prompt: torch.Tensor, data: _States) -> tuple[torch.Tensor, torch.Tensor]:
        """For each offset, the mean KL in nats, and the share of equal top tokens."""
        numbers = []
        for batch in torch.arange(len(data.states)).split(_BATCH):
            states, following, outputs = (part[batch] for part in data)
            with torch.no_grad():
                own, on_prompt = log_probabilities(self.net, outputs), self.predict(prompt, states, following)
            same = own.argmax(-1) == on_prompt.argmax(-1)
            numbers.append(torch.stack([kl_nats(own, on_prompt), same.float()]))
        kl, same = torch.cat(numbers, dim=1).double().mean(1)
        return kl, same

    def score(
        self, prompt: torch.Tensor, start: torch.Tensor, held: _States, *, other: _States
    ) -> tuple[FutureScore, ...]:
        """Score a prompt beside its start, and beside itself with the states of other texts."""
        indices = torch.arange(len(held.states)) % len(other.states)
        shuffled = held._replace(states=other.states[indices])
        comparisons = (
            self.compare(prompt, held),
            self.compare(start, held),
            self.compare(prompt, shuffled),
        )
        return tuple(
            FutureScore(
                layer=self.layer,
                offset=offset,
                n_states=len(held.states),
                **{
                    f"{prefix}{name}": float(numbers[index])
                    for prefix, comparison in zip(("", "untrained_", "shuffled_"), comparisons, strict=True)
                    for name, numbers in zip(("kl_nats", "agreement"), comparison, strict=True)
                },
            )
            for index, offset in enumerate(self.offsets)
        )


KIND = TrainedKind(
    name="soft_prompt",
    summary="A learned target prompt with which the model says what a state predicts (arXiv 2311.04897).",
    fit=fit_soft_prompt,
    reads="texts",
    options={
        "layer": Option("l, and l*: one layer.", selector=True),
        "tokens": Option("k, the prompt's length.", 1),
        "offsets": Option("The tokens to predict: 0 is the next, [0, 1] the next two.", selector=True),
        "max_tokens": MAX_TOKENS,
        "skip_first": SKIP_FIRST,
    },
    training=_TRAINING,
    data="builtin:contexts",
)
