"""Data rows as examples: a state to read, where it is written, and the text that should follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from patchscope_nn.errors import InputError
from patchscope_nn.fitting.trained.frozen import Frozen, Tokens, Write
from patchscope_nn.models import Model
from patchscope_nn.spec import Source, Target
from patchscope_nn.spec.positions import resolve_positions
from patchscope_nn.spec.prompts import continuation_ids, encode, parse_prompt, render

#: Rows of a forward pass that takes no gradient.
BATCH = 16


class Example(NamedTuple):
    """One row.

    Attributes:
        source: S, token ids.
        source_positions: i, from the left.
        target: T, token ids.
        target_positions: i*, as many as i, or where i is one token, any number.
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
    """Fill and tokenize the prompts of data rows.

    Args:
        rows: The data.
        model: M, which reads S.
        to: M*, which reads T and the text.
        source: S and i.
        target: T and i*.
        text: What should follow T; `{column}` placeholders are filled by the data.

    Returns:
        An example for each row and each of its positions.

    Raises:
        InputError: A prompt, a position or the text does not resolve, or T is not given.
    """
    if source.prompt is None or target.prompt is None:
        side = "source" if source.prompt is None else "target"
        raise InputError(
            f"{side}.prompt was not given; states come from a prompt S, and the text follows a prompt T.",
            hint="Give T a placeholder token, as the few-shot prompt prompts.DESCRIBE has one.",
        )
    found = []
    for row in rows:
        read = encode(
            render(source.prompt, row, field="source.prompt"), model.tokenizer, field="source.prompt"
        )
        written = encode(
            render(target.prompt, row, field="target.prompt"), to.tokenizer, field="target.prompt"
        )
        filled = str(render(parse_prompt(text), row, field="text"))
        said = continuation_ids(written, filled, to.tokenizer, field="text")
        after = resolve_positions(
            -1 if target.position is None else target.position, written, field="target.position"
        )
        found += [
            Example(read.ids, i, written.ids, i_star, said)
            for i in resolve_positions(source.position, read, field="source.position")
            for i_star in after
        ]
    widths = {(len(one.source_positions), len(one.target_positions)) for one in found}
    if len(widths) > 1 or any(i not in (1, i_star) for i, i_star in widths):
        raise InputError(
            f"source.position and target.position name {sorted(widths)} tokens (of S, of T).",
            hint="Name one token of S, or as many as of T, and the same number in every row.",
        )
    return found


def read_examples(net: Frozen, examples: Sequence[Example], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """The states the examples read: for each layer, (n_examples, n_read, d_model); (0,) of no examples."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(examples), BATCH):
        group = examples[start : start + BATCH]
        with torch.no_grad():
            states = net.run(net.batch([one.source for one in group]), read=layers)
        for layer in layers:
            found[layer] += [states[layer][row, list(one.source_positions)] for row, one in enumerate(group)]
    return {layer: torch.stack(parts) if parts else torch.empty(0) for layer, parts in found.items()}


def text_nll_nats(
    net: Frozen, examples: Sequence[Example], states: torch.Tensor, *, layer: int
) -> tuple[torch.Tensor, int]:
    """What the texts cost the model that reads T with mapped states in it.

    Args:
        net: M*.
        examples: The examples.
        states: (n_examples, n_written or 1, d_model), f(h).
        layer: l*.

    Returns:
        The sum over the texts' tokens of -log p, in nats; and how many tokens there are.
    """
    tokens: Tokens = net.batch([one.target + one.text for one in examples])
    write = Write(layer=layer, positions=[one.target_positions for one in examples], states=states)
    last = net.run(tokens, read={net.last}, writes=[write])[net.last]
    rows = [row for row, one in enumerate(examples) for _ in one.text]
    columns = [len(one.target) - 1 + number for one in examples for number in range(len(one.text))]
    wanted = torch.tensor([token for one in examples for token in one.text], device=last.device)
    logits = net.unembed(last[rows, columns]).float()
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"), len(wanted)
