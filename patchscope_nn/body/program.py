"""`StepProgram`: one step of a plan as plain values. It is all that plan and body know of each other.

A body may run on a server that does not have this package. So a program holds only dictionaries, lists,
strings, numbers and tensors, and never a `Cell`, a `Plan`, a tokenizer or a callback. `lower` builds it; the
functions of `body` read it and never change it.

Hidden states are known by **state numbers**: `plan.Step.numbers` gives one to every state that the step reads
or takes over from an earlier step, and `lower` numbers the states that are made of these from there on.
Layers are block numbers; -1 is the input of block 0. Positions are columns of the padded batch, or places in
the packed sequence.
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
    #: Which of its tensors: `output` or `input`.
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
    #: True if the pass runs through the whole model, also where nothing needs that.
    whole: bool
    #: Hidden states to read, by layer, in ascending order of layers.
    reads: dict[int, list[Read]]
    #: Next-token distributions to read; their positions count from the end.
    finals: list[Read]


class Sum(TypedDict):
    """A state that is made of others: their weighted sum."""

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
    #: What the mapped state is multiplied with.
    scale: float


class Embedded(TypedDict):
    """What is done to the embeddings of one row."""

    #: Row in the batch.
    row: int
    #: First column of the prompt, and the one after its last.
    start: int
    end: int
    #: Number of a soft prompt that replaces the first embeddings; None for none.
    soft: int | None
    #: Standard deviation of the noise, in units of that of the row's embeddings; 0 for none.
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
    """What a target pass reads: the kind's own body and arguments, and what a `PatchedRun` needs to know."""

    #: The function that reads it: `read(run, **asked)` with a `PatchedRun`. It travels by its source.
    read: Callable[..., list[dict[str, Any]]]
    #: Its keyword arguments, as the kind's `lower` gives them.
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
    """What every target pass has: rows of a padded batch, or segments of one sequence."""

    #: How many cells it has.
    cells: int
    #: As in `SourceProgram`.
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any]
    #: What is written, by layer, in ascending order of layers.
    writes: dict[int, list[Write]]
    #: What is read from it.
    readout: ReadoutProgram
    #: The attention window of each block; None where it sees everything.
    windows: list[int | None]
    #: The names of a block's positional arguments.
    names: list[str]


class RowsProgram(TargetProgram):
    """A target pass over a padded batch: one row for each cell."""

    #: Tells it from a packed pass.
    layout: Literal["rows"]
    #: Changes to embeddings.
    embedded: list[Embedded]
    #: Cut attention edges, by layer.
    cuts: dict[int, list[Cut]]
    #: True if each decoded token reads the prompt again, without a cache.
    rereads: bool
    #: True if the state is written again at each decoded token.
    every_step: bool
    #: Where each row is read; counted from the end.
    positions: list[int]


class CellRows(TypedDict):
    """Where the tokens of each cell's whole prompt stand in the packed sequence: (n_cells, n_tokens)."""

    #: In the blocks that the cell's own tokens run through.
    own: torch.Tensor
    #: In the blocks before these: the tokens of the unpatched prompt.
    clean: torch.Tensor
    #: (n_cells,) the layer after which a cell's own tokens join.
    enters: torch.Tensor


class OwnTokens(TypedDict):
    """The tokens behind the prefix that each token attends to: (n_tokens, n_own)."""

    #: Their places behind the prefix.
    places: torch.Tensor
    #: Which of these are real; the others are padding.
    real: torch.Tensor


class PackedProgram(TargetProgram):
    """A target pass over one sequence that holds the segments of all its cells (see `plan/layout.py`)."""

    #: Tells it from a pass over rows.
    layout: Literal["packed"]
    #: How many blocks run.
    depth: int
    #: How many tokens run from block 0 on.
    entering: int
    #: By layer, for each token that joins after it, the place of the unpatched token it starts from; None for
    #: one that is about to be written.
    bases: dict[int, list[int | None]]
    #: How many tokens of the sequence come from the step's prefix.
    prefix: int
    #: How many tokens are behind the prefix.
    n_tokens: int
    #: What each token attends to besides the prefix, if the two are attended separately; else None.
    own: OwnTokens | None
    #: (n_tokens, prefix + n_tokens) whether a token attends to another; None where `own` tells it.
    allowed: torch.Tensor | None
    #: (prefix + n_tokens,) the position of each token in its own prompt.
    key_positions: torch.Tensor
    #: True if a block returns a tuple.
    tuples: bool
    #: (n_cells) which tokens are read.
    read: list[int]
    #: For readouts that decode: the rows of the cache that decoding starts from; None for others.
    rows: CellRows | None


class PrefixProgram(TypedDict):
    """The tokens that all packed target prompts of a step begin with."""

    #: As in `SourceProgram`; a batch of one row.
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any]
    #: Its keys and values where an earlier step has computed them; None where this step does.
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
    """One step: source passes, then target passes that use what those read."""

    #: The passes, in the order in which they run.
    sources: list[SourceProgram]
    targets: list[RowsProgram | PackedProgram]
    #: What the packed target passes begin with; None if they share nothing.
    prefix: PrefixProgram | None
    #: States that come in, by number: from earlier steps, or from files.
    given: dict[int, torch.Tensor]
    #: States that are made of others.
    sums: list[Sum]
    #: Numbers of the states that the step returns.
    keep: list[int]
    #: How states are mapped and written.
    writing: Writing
    #: Where states are read, and where they are written.
    source_site: SitePath
    target_site: SitePath


class Series(TypedDict):
    """Several steps that run in one context."""

    #: The steps; none uses states of another.
    series: list[StepProgram]


class Results(TypedDict):
    """What a step returns."""

    #: For each target pass the readouts of its cells.
    passes: list[list[dict[str, Any]]]
    #: The states that were asked for, by number.
    kept: dict[int, torch.Tensor]
    #: The prefix's keys and values; None where they were not asked for.
    prefix: Any


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


def identity_writing() -> Writing:
    """The writing of a step that maps and changes nothing."""
    return {"mapping": "identity", "weights": None, "mode": "replace", "amount": 0.0}
