"""Training examples from data rows: a state to read, where it is written, and the text that should follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from patchscope_nn.errors import InputError
from patchscope_nn.fitting.reading import Row, read_rows
from patchscope_nn.fitting.trained.frozen import Frozen, Write
from patchscope_nn.models import Model
from patchscope_nn.spec import Source, Target
from patchscope_nn.spec.encoding import continuation_ids, encode
from patchscope_nn.spec.positions import resolve_positions
from patchscope_nn.spec.prompts import parse_prompt, render


class Example(NamedTuple):
    """One example.

    Attributes:
        source: S, token ids.
        source_positions: i, from the left.
        target: T, token ids.
        target_positions: i*, as many as i; if i is one token, any number.
        text: The token ids that should follow T.
    """

    source: tuple[int, ...]
    source_positions: tuple[int, ...]
    target: tuple[int, ...]
    target_positions: tuple[int, ...]
    text: tuple[int, ...]


def make_examples(
    rows: Sequence[Mapping[str, Any]], *, model: Model, to: Model, source: Source, target: Target, text: str
) -> list[Example]:
    """Fill in and tokenize the prompts of data rows.

    Args:
        rows: The data.
        model: M, which reads S.
        to: M*, which reads T and the text.
        source: S and i.
        target: T and i*.
        text: What should follow T; `{column}` is filled in from the data.

    Returns:
        An example for each row and each of its positions.

    Raises:
        InputError: A prompt, a position or the text does not resolve, or T is not given.
    """
    if source.prompt is None or target.prompt is None:
        side = "source" if source.prompt is None else "target"
        raise InputError(
            f"{side}.prompt was not given; states come from a prompt S, and the text follows a prompt T.",
            hint="Give both prompts; T needs a placeholder token, as in the prompt prompts.DESCRIBE.",
        )
    examples = []
    for row in rows:
        read = encode(
            render(source.prompt, row, field="source.prompt"), model.tokenizer, field="source.prompt"
        )
        written = encode(
            render(target.prompt, row, field="target.prompt"), to.tokenizer, field="target.prompt"
        )
        filled = str(render(parse_prompt(text), row, field="text"))
        following = continuation_ids(written, filled, to.tokenizer, field="text")
        placeholders = resolve_positions(
            -1 if target.position is None else target.position, written, field="target.position"
        )
        examples += [
            Example(read.ids, i, written.ids, i_star, following)
            for i in resolve_positions(source.position, read, field="source.position")
            for i_star in placeholders
        ]
    widths = {(len(example.source_positions), len(example.target_positions)) for example in examples}
    if len(widths) > 1 or any(i not in (1, i_star) for i, i_star in widths):
        raise InputError(
            f"source.position and target.position name {sorted(widths)} tokens (of S, of T).",
            hint="Name one token of S, or as many as of T, and the same number in every row.",
        )
    return examples


def read_examples(
    model: Model, examples: Sequence[Example], layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Read the source states of examples: (n_examples, n_read, d_model) for each layer; (0,) if none."""
    if not examples:
        return {layer: torch.empty(0) for layer in layers}
    rows = [Row(example.source, example.source_positions) for example in examples]
    return {layer: torch.stack(states) for layer, states in read_rows(rows, layers, model).items()}


def text_nll_nats(
    net: Frozen, examples: Sequence[Example], states: torch.Tensor, *, layer: int
) -> tuple[torch.Tensor, int]:
    """The negative log-likelihood of the texts after T, with mapped states written into T.

    Args:
        net: M*.
        examples: The examples.
        states: (n_examples, n_written or 1, d_model), f(h).
        layer: l*.

    Returns:
        The sum of -log p over the tokens of the texts, in nats; and the number of tokens.
    """
    tokens = net.batch([example.target + example.text for example in examples])
    positions = [example.target_positions for example in examples]
    write = Write(layer=layer, positions=positions, states=states)
    last = net.run(tokens, read={net.last}, writes=[write])[net.last]
    rows = [row for row, example in enumerate(examples) for _ in example.text]
    columns = [len(example.target) - 1 + index for example in examples for index in range(len(example.text))]
    expected = torch.tensor([token for example in examples for token in example.text], device=last.device)
    logits = net.unembed(last[rows, columns]).float()
    return torch.nn.functional.cross_entropy(logits, expected, reduction="sum"), len(expected)
