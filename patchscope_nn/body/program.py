"""What a body is given: a step of a plan as plain values, which is all that may enter a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Work = dict[str, Any]


class PatchedRun(Protocol):
    """What a readout's body is given: a pass whose target prompts have been read, with the patch.

    Nothing from here on is patched, unless `target.every_step` asks for it.

    Attributes:
        n_cells: The cells of the pass. A body returns one dict of plain values for each, in their order.
        logits: (n_cells, vocab) where T is read; None for a readout that does not unembed.
        forward: M* as a function of the keyword arguments of its own `forward`.
        plain: M* without any patch, as such a function.
        cache: The prompts' keys and values, a row for each cell; only for a readout that decodes.
        mask: (n_cells, n_tokens) the prompts' attention mask, 0 where a row is padded; as `cache`.
        states: By number what was read of M: (n_positions, d_model) states and (vocab,) log-probabilities.
        written: By cell the (n_positions, d_model) states that were written and those they replaced; there is
            no entry for a cell that is not patched.
        numbered: True if `forward` takes position_ids.
        extra: More keyword arguments for a `forward` whose last logits alone are read.
        eos: Ids that end a text.
        leaving: True if rows that have ended may leave the batch.
        mixed: True if rows of different lengths may share a forward.
        rereads: True if `forward` reads the prompt again and takes its ids for `cache`. Its logits then begin
            with those after the last token that was read before.
        stepwise: True if tokens behind the prompt must be read one by one, each seeing only those before it.
        heard: Called at each step of decoding with the rows that go on and the token of each; None elsewhere
            than in this process.
    """

    n_cells: int
    logits: torch.Tensor
    forward: Callable[..., Any]
    plain: Callable[..., Any]
    cache: Any
    mask: torch.Tensor
    states: Mapping[int, torch.Tensor]
    written: Mapping[int, Sequence[torch.Tensor]]
    numbered: bool
    extra: dict[str, Any]
    eos: list[int]
    leaving: bool
    mixed: bool
    rereads: bool
    stepwise: bool
    heard: Callable[[list[int], list[int]], None] | None
