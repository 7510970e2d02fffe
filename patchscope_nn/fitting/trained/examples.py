"""Training examples from data rows: a state to read, where it is written, and the text that should follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from patchscope_nn.errors import InputError
from patchscope_nn.models import Model
from patchscope_nn.spec import Source, Target
from patchscope_nn.spec.encoding import continuation_ids, encode
from patchscope_nn.spec.positions import resolve_positions
from patchscope_nn.spec.prompts import parse_prompt, render


class Example(NamedTuple):
    """A training example; prompts and text are token ids, and positions count from the left."""

    source: tuple[int, ...]  # S
    source_positions: tuple[int, ...]  # i
    target: tuple[int, ...]  # T
    target_positions: tuple[int, ...]  # i*: as many as i; any number if i is one token
    text: tuple[int, ...]  # what should follow T


def make_examples(
    rows: Sequence[Mapping[str, Any]], *, model: Model, to: Model, source: Source, target: Target, text: str
) -> list[Example]:
    """Fill in and tokenize the prompts of data rows, for each row and each of its positions.

    `model` is M, which reads S; `to` is M*, which reads T and the text that should follow it.

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
