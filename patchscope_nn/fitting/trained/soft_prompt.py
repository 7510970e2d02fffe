"""Soft prompts (Future Lens, Pal et al. 2023, arXiv 2311.04897): a target prompt of learned embeddings.

T is k tokens whose states at the input of block 0 are learned; the state h of a text's token t at layer l is
written at the last of them at layer l* = l. Then the text's own tokens follow, and the model should say after
them what it says after them in the text: the loss is KL(model on the text || model on T) after token t + n,
meaned over the offsets n that are asked for (n = 0 foretells the next token), as in the authors' code
(github.com/KoyenaPal/future-lens, `causal_methods/module.py`). The prompt starts as random tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from patchscope_nn._util.arguments import checked
from patchscope_nn.errors import DataError, LayerError, MappingError
from patchscope_nn.fitting.trained.frozen import Frozen, Write, choose_layers, frozen
from patchscope_nn.fitting.trained.held_out import deal_texts
from patchscope_nn.fitting.trained.lens import kl_nats, log_probabilities
from patchscope_nn.fitting.trained.outcome import Progress
from patchscope_nn.fitting.trained.training import Training, descend
from patchscope_nn.mappings import Provenance, Space
from patchscope_nn.mappings.fitted import METADATA
from patchscope_nn.models import Model
from patchscope_nn.spec.layers import EMBED

#: Texts of a forward pass that takes no gradient.
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class FutureScore:
    """How well T foretells the model n tokens after a state, on texts it was not trained on.

    Attributes:
        layer: l, and l*.
        offset: n; 0 is the next token.
        n_states: How many states were scored.
        kl_nats: The mean of KL(model on the text || model on T).
        agreement: The share whose top token is the model's on the text.
        untrained_kl_nats: The same KL with the prompt as it was at first.
        untrained_agreement: The same share of that.
        shuffled_kl_nats: The same KL with the state of a text that was trained on.
        shuffled_agreement: The same share of that.
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


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedPrompt:
    """A soft prompt.

    Attributes:
        soft_prompt: (k, d_model), what stands at the input of block 0 in place of T's first k tokens.
        held_out: A `FutureScore` for each offset.
        about: Where it comes from; what was held out is there under the one pair (l, l), by offset.
    """

    soft_prompt: torch.Tensor
    held_out: tuple[FutureScore, ...]
    about: Provenance

    def said(self) -> dict[str, Any]:
        """What the file's metadata says."""
        return {"kind": "soft_prompt", **self.about.dump()}

    def save(self, file: str | Path) -> Path:
        """Write a safetensors file: the tensor `soft_prompt`, and in its metadata where it comes from.

        Returns:
            The file.

        Raises:
            MappingError: It cannot be written.
        """
        file = Path(file)
        tensors = {"soft_prompt": self.soft_prompt.contiguous().cpu()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file, metadata={METADATA: json.dumps(self.said())})
        except OSError as error:
            raise MappingError(f"{file} cannot be written: {error}.", hint="Name another file.") from error
        return file


class _Seen(NamedTuple):
    """States of texts, and what the model says after each.

    Attributes:
        states: (n, 1, d_model), h at layer l.
        following: (n, most offset) the texts' tokens after it.
        outputs: (n, n_offsets, d_model), the last block's states from which the tokens are foretold.
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
    """Learn a target prompt that makes the model say what a state of a text foretells.

    Args:
        model: The model.
        texts: What it reads.
        layer: l, and l*: one layer.
        tokens: k, the length of T; the authors use 10.
        offsets: The n that are trained for.
        max_tokens: How many tokens of a text are read.
        skip_first: How many tokens at a text's beginning are left out.
        training: How; a batch is of states. None takes a learning rate of 0.01 and batches of 16.
        progress: Called with (steps done, steps in all).

    Returns:
        The prompt, scored for each offset.

    Raises:
        LayerError: The layer lies outside the model, or there are several.
        DataError: The texts are too few or too short, or `tokens` or `offsets` is out of range.
        ModelError: What follows the model's last block is not known.
    """
    training = training or Training(learning_rate=0.01, batch=16)
    chosen = choose_layers(model, layer)
    if len(chosen) != 1:
        raise LayerError(
            f"layer={layer!r} names {len(chosen)} layers; a soft prompt is learned for one.",
            hint="Give one, and fit another prompt for the next.",
        )
    wanted = sorted(set(offsets))
    if tokens < 1 or not wanted or wanted[0] < 0:
        raise DataError(
            f"tokens={tokens} and offsets={list(offsets)} leave nothing to learn.",
            hint="Give 1 token or more, and offsets from 0 (the next token).",
        )
    parts = deal_texts(
        texts,
        model.tokenizer,
        held_out=training.held_out,
        stopping=training.stopping,
        seed=training.seed,
        max_tokens=max_tokens,
        least=skip_first + wanted[-1] + 1,
    )
    with frozen(model) as net:
        course = _Course(net, layer=chosen[0], tokens=tokens, offsets=wanted)
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
                "offsets": wanted,
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
        """The states of random tokens at the input of block 0, (k, d_model)."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(len(self.net.model.tokenizer), (self.tokens,), generator=generator).tolist()
        with torch.no_grad():
            return self.net.run(self.net.batch([ids]), read={EMBED})[EMBED][0].float()

    def read(self, sequences: Sequence[Sequence[int]], *, skip_first: int) -> _Seen:
        """Every token of some texts that enough tokens follow."""
        states, following, outputs = [], [], []
        most = self.offsets[-1]
        for start in range(0, len(sequences), _BATCH):
            group = sequences[start : start + _BATCH]
            with torch.no_grad():
                found = self.net.run(self.net.batch(group), read={self.layer, self.net.last})
            for row, ids in enumerate(group):
                for t in range(skip_first, len(ids) - most):
                    states.append(found[self.layer][row, t : t + 1])
                    following.append(list(ids[t + 1 : t + 1 + most]))
                    outputs.append(found[self.net.last][row, [t + offset for offset in self.offsets]])
        return _Seen(torch.stack(states), torch.tensor(following, dtype=torch.long), torch.stack(outputs))

    def said(self, prompt: torch.Tensor, states: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """What the model says on T at each offset: (n, n_offsets, vocab_size) log probabilities."""
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
        fitted: _Seen,
        stopping: _Seen | None,
        *,
        training: Training,
        progress: Progress | None,
    ) -> int:
        """Train a prompt, and say at which step it was left."""
        generator = torch.Generator().manual_seed(training.seed)

        def losses() -> Iterator[torch.Tensor]:
            chosen = torch.randperm(len(fitted.states), generator=generator)[: training.batch]
            states, following, outputs = (part[chosen] for part in fitted)
            with torch.no_grad():
                own = log_probabilities(self.net, outputs)
            yield kl_nats(own, self.said(prompt.states, states, following)).mean()

        def score() -> dict[str, float]:
            return {"prompt": float(self.foretell(prompt.states, stopping)[0].mean()) if stopping else 0.0}

        return descend({"prompt": prompt}, losses=losses, score=score, training=training, progress=progress)[
            "prompt"
        ]

    def foretell(self, prompt: torch.Tensor, seen: _Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """For each offset, the mean KL in nats, and the share of equal top tokens."""
        found = []
        for chosen in torch.arange(len(seen.states)).split(_BATCH):
            states, following, outputs = (part[chosen] for part in seen)
            with torch.no_grad():
                own, said = log_probabilities(self.net, outputs), self.said(prompt, states, following)
            found.append(torch.stack([kl_nats(own, said), (own.argmax(-1) == said.argmax(-1)).float()]))
        kl, same = torch.cat(found, dim=1).double().mean(1)
        return kl, same

    def score(
        self, prompt: torch.Tensor, start: torch.Tensor, held: _Seen, *, other: _Seen
    ) -> tuple[FutureScore, ...]:
        """Score a prompt beside its start, and with states of other texts."""
        chosen = torch.arange(len(held.states)) % len(other.states)
        shuffled = held._replace(states=other.states[chosen])
        readings = (
            self.foretell(prompt, held),
            self.foretell(start, held),
            self.foretell(prompt, shuffled),
        )
        return tuple(
            FutureScore(
                layer=self.layer,
                offset=offset,
                n_states=len(held.states),
                **{
                    f"{name}{what}": float(numbers[index])
                    for name, reading in zip(("", "untrained_", "shuffled_"), readings, strict=True)
                    for what, numbers in zip(("kl_nats", "agreement"), reading, strict=True)
                },
            )
            for index, offset in enumerate(self.offsets)
        )
