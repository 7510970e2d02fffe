"""`StepProgram`: one step of a plan as plain values, the whole interface between `plan` and `body`.

A body may run on a server that does not have this package. So a program holds only dictionaries, lists,
strings, numbers and tensors, and never a `Cell`, a `Plan`, a tokenizer or a callback. `lower` builds it; the
functions of `body` read it and never change it.

Hidden states are referred to by **state numbers**: `plan.Step.numbers` numbers every state that the step
reads or takes over from an earlier step, and `lower` continues with the states that are computed from these.
Layers are block numbers; -1 is the input of block 0. Positions are columns of the padded batch, or indices
into the packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

import torch


class SitePath(TypedDict):
    """Where a site is in a model."""

    #: Path of the list of blocks, for example `model.layers`.
    blocks: str
    #: Path of a part inside a block, for example `self_attn`; empty for the block itself.
    part: str
    #: Which tensor of it: `output` or `input`.
    end: str


class Read(TypedDict):
    """One state that a source pass reads."""

    #: Its state number.
    state: int
    #: Its row in the batch.
    row: int
    #: Its positions; the state is (n_positions, d_model). For a distribution the last one counts.
    positions: list[int]


class SourceProgram(TypedDict):
    """One forward pass over a padded batch of source prompts."""

    #: Arguments of the model: `input_ids`, `attention_mask`, perhaps `position_ids`, each (batch, width).
    inputs: dict[str, torch.Tensor]
    #: Further arguments of the model: `use_cache`, `logits_to_keep`.
    options: dict[str, Any]
    #: True if the pass runs through the whole model, even if no state needs that.
    whole: bool
    #: Hidden states to read, by layer, in ascending order of layers.
    reads: dict[int, list[Read]]
    #: Next-token distributions to read; their positions count from the end.
    finals: list[Read]


class Sum(TypedDict):
    """A state that is the weighted sum of others."""

    #: Its state number.
    state: int
    #: The terms: state number and weight.
    terms: list[tuple[int, float]]
    #: True if each term is first averaged over its positions.
    mean: bool


class Write(TypedDict):
    """One state that is written into a target prompt."""

    #: The cell it belongs to, counted within its pass.
    cell: int
    #: Number of the state; None if the write needs none (`zero`, `noise`).
    state: int | None
    #: Row in the batch.
    row: int
    #: Where it is written. One state is written at all positions; several states are written one to one.
    positions: list[int]
    #: Seed of random numbers; None if there are none.
    seed: int | None
    #: (l, l*) that the mapping takes the state between.
    pair: tuple[int, int]
    #: The factor of the mapped state.
    scale: float


class Embedded(TypedDict):
    """Changes to the embeddings of one row."""

    #: Row in the batch.
    row: int
    #: First column of the prompt, and the one after its last.
    start: int
    end: int
    #: Number of a soft prompt that replaces the first embeddings; None for none.
    soft: int | None
    #: Standard deviation of the noise, in units of that of the row's own embeddings; 0 for none.
    noise: float
    #: The columns that get the noise.
    positions: list[int]
    #: Seed of the noise.
    seed: int


class Cut(TypedDict):
    """Attention edges that are cut in one row."""

    #: Row in the batch; none of its columns `positions` attends to any of its columns `unseen`.
    row: int
    positions: list[int]
    unseen: list[int]


class ReadoutProgram(TypedDict):
    """What a target pass reads: the body of the kind, its arguments, and the fields of a `PatchedRun`."""

    #: The function that reads it: `read(run, **asked)` with a `PatchedRun`. It travels by its source.
    read: Callable[..., list[dict[str, Any]]]
    #: Its keyword arguments, from the kind's `lower`.
    asked: dict[str, Any]
    #: As the attributes of the kind say (see `spec.Readout`); `clean` is `looks_at_replaced`.
    unembeds: bool
    decodes: bool
    finite: list[str]
    clean: bool
    #: As in `PatchedRun`.
    n_cells: int
    numbered: bool
    extra: dict[str, Any]
    eos: list[int]
    leaving: bool
    mixed: bool
    rereads: bool
    stepwise: bool
    #: (n_cells, n_tokens) the attention mask of the prompts; None if nothing is decoded.
    mask: torch.Tensor | None


class TargetProgram(TypedDict):
    """The fields that every target pass has, over rows of a padded batch or segments of one sequence."""

    #: How many cells it has.
    cells: int
    #: As in `SourceProgram`.
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any]
    #: The states to write, by layer, in ascending order of layers.
    writes: dict[int, list[Write]]
    #: What is read from it.
    readout: ReadoutProgram
    #: The attention window of each block; None for no window.
    windows: list[int | None]
    #: The names of a block's positional arguments.
    names: list[str]


class RowsProgram(TargetProgram):
    """A target pass over a padded batch: one row for each cell."""

    #: Marks a pass over rows.
    layout: Literal["rows"]
    #: Changes to embeddings.
    embedded: list[Embedded]
    #: Cut attention edges, by layer.
    cuts: dict[int, list[Cut]]
    #: True if each decoded token reads the prompt again, without a cache.
    rereads: bool
    #: True if the state is written again at each decoded token.
    every_step: bool
    #: The position where each row is read, counted from the end.
    positions: list[int]


class CellRows(TypedDict):
    """Where the tokens of each cell's whole prompt are in prefix and sequence: (n_cells, n_tokens)."""

    #: In the blocks that the cell's own tokens run through.
    own: torch.Tensor
    #: In the blocks before these: the tokens of the unpatched prompt.
    clean: torch.Tensor
    #: (n_cells,) the layer after which a cell's own tokens join the sequence.
    enters: torch.Tensor


class OwnTokens(TypedDict):
    """The tokens after the prefix that each token attends to: (n_tokens, n_own)."""

    #: Their indices after the prefix.
    places: torch.Tensor
    #: True for a token; the others are padding.
    real: torch.Tensor


class PackedProgram(TargetProgram):
    """A target pass over one sequence that holds the segments of all its cells (see `plan/layout.py`)."""

    #: Marks a packed pass.
    layout: Literal["packed"]
    #: How many blocks run.
    depth: int
    #: How many tokens run from block 0 on.
    entering: int
    #: By layer, for each token that joins after it, the index of the unpatched token it starts from; None for
    #: a token that is about to be written.
    bases: dict[int, list[int | None]]
    #: How many tokens the step's prefix has.
    prefix: int
    #: How many tokens are after the prefix.
    n_tokens: int
    #: The tokens that each token attends to besides the prefix, if it attends to both separately; else None.
    own: OwnTokens | None
    #: (n_tokens, prefix + n_tokens) True if a token attends to another; None if there is `own`.
    allowed: torch.Tensor | None
    #: (prefix + n_tokens,) the position of each token in its own prompt.
    key_positions: torch.Tensor
    #: True if a block returns a tuple.
    tuples: bool
    #: (n_cells) the index of the token that is read.
    read: list[int]
    #: For readouts that decode: the rows of the cache that decoding starts from; None for others.
    rows: CellRows | None


class PrefixProgram(TypedDict):
    """The tokens that all packed target prompts of a step begin with."""

    #: As in `SourceProgram`; a batch of one row.
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any]
    #: Its keys and values, if an earlier step has computed them; None if this step computes them.
    known: Any
    #: True if the step returns its keys and values, for later steps.
    kept: bool


class Writing(TypedDict):
    """How states are mapped and written."""

    #: The kind of the mapping: `identity`, `call` or `pairs`.
    mapping: str
    #: The mapping's function or weights; None for the identity.
    weights: Any
    #: The write mode: `replace`, `add`, `blend`, ...
    mode: str
    #: The number that goes with the mode.
    amount: float


class StepProgram(TypedDict):
    """One step: source passes, then target passes that use the states of these."""

    #: The passes, in the order in which they run.
    sources: list[SourceProgram]
    targets: list[RowsProgram | PackedProgram]
    #: The tokens that the packed target passes begin with; None if they share none.
    prefix: PrefixProgram | None
    #: States from earlier steps and from files, by number.
    given: dict[int, torch.Tensor]
    #: States that are sums of others.
    sums: list[Sum]
    #: Numbers of the states that the step returns.
    keep: list[int]
    #: How states are mapped and written.
    writing: Writing
    #: The sites where states are read and written.
    source_site: SitePath
    target_site: SitePath


class Series(TypedDict):
    """Several steps that run in one context."""

    #: The steps. No step uses states of another.
    series: list[StepProgram]


class Results(TypedDict):
    """What a step returns."""

    #: For each target pass, the readouts of its cells.
    passes: list[list[dict[str, Any]]]
    #: The states named by `keep`, by number.
    kept: dict[int, torch.Tensor]
    #: The keys and values of the prefix; None if they are not kept.
    prefix: Any


class PatchedRun(Protocol):
    """The input of a readout's body: a pass whose target prompts have been read, with the patch.

    Nothing after the prompts is patched, unless `target.every_step` is set.

    Attributes:
        n_cells: The number of cells. A body returns one dict of plain values for each cell, in order.
        logits: (n_cells, vocab) at the position where T is read; None for a readout that does not unembed.
        forward: M* as a function, with the keyword arguments of its own `forward`.
        plain: M* without any patch, as a function with the same arguments.
        cache: The prompts' keys and values, a row for each cell; only for a readout that decodes.
        mask: (n_cells, n_tokens) the prompts' attention mask, 0 for padding; only for a readout that decodes.
        states: By number, what was read from M: (n_positions, d_model) states and (vocab,) log-probabilities.
        written: By cell, the (n_positions, d_model) states that were written and those they replaced. An
            unpatched cell has no entry.
        numbered: True if `forward` takes position_ids.
        extra: More keyword arguments for a `forward` of which only the last logits are read.
        eos: Ids that end a text.
        leaving: True if rows that have ended may leave the batch.
        mixed: True if rows of different lengths may share a forward pass.
        rereads: True if `forward` reads the prompt again, and `cache` holds its ids. Its logits then begin
            with those after the last token that was read before.
        stepwise: True if tokens after the prompt must be read one by one, so that none attends to a later
            one.
        heard: Called after each decoding step with the rows that continue and the token of each; None unless
            the pass runs in this process.
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


def identity_writing() -> Writing:
    """Return the writing of a step that leaves states as they are."""
    return {"mapping": "identity", "weights": None, "mode": "replace", "amount": 0.0}
