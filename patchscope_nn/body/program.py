"""`StepProgram`: one step of a plan as plain values, the whole interface between `plan` and `body`.

A body may run on a server that does not have this package. So a program holds only dictionaries, lists,
strings, numbers and tensors, and never a `Cell`, a `Plan`, a tokenizer or a callback. `lower` builds it; the
functions of `body` read it and never change it.

Hidden states are the rows of one table, (n_states, d_model): first those that are given, then those that
source passes read, in the order of the passes and of layers, then sums of these. A state of several positions
has several rows. Layers are block numbers; -1 is the input of block 0. Positions are columns of the padded
batch, or indices into the packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    #: How many tensors at the start of its output add up to the states.
    terms: int
    #: The argument of a block that holds the states: index and name.
    argument: tuple[int, str]


class Places(TypedDict):
    """Places in a batch; each tensor has a number for each place."""

    #: Rows of the batch.
    rows: torch.Tensor
    #: Positions in these rows.
    positions: torch.Tensor


class SourceProgram(TypedDict):
    """One forward pass over a padded batch of source prompts."""

    #: Arguments of the model: `input_ids`, `attention_mask`, perhaps `position_ids`, each (batch, width).
    inputs: dict[str, torch.Tensor]
    #: Further arguments of the model: `use_cache`, `logits_to_keep`.
    options: dict[str, Any]
    #: True if the pass runs through the whole model, even if no state needs that.
    whole: bool
    #: Hidden states to read, by layer, in ascending order of layers.
    reads: dict[int, Places]
    #: Where next-token distributions are read; positions count from the end. None for none.
    finals: Places | None


class Sums(TypedDict):
    """States that are weighted sums of others; each tensor has a number for each term."""

    #: How many rows they have.
    count: int
    #: The row of the term.
    states: torch.Tensor
    #: Its weight.
    weights: torch.Tensor
    #: The sum that it is added to, counted from the first sum.
    into: torch.Tensor


class Random(TypedDict):
    """Random states; each tensor has a number for each written position."""

    #: True if the state is replaced by a random one.
    which: torch.Tensor
    #: Its seed.
    seeds: torch.Tensor
    #: Which draw of the seed it is.
    draws: torch.Tensor


class Write(TypedDict):
    """The states that are written in one layer; each tensor has a number for each written position."""

    #: The cell it belongs to, counted within its pass.
    cells: torch.Tensor
    #: Where it is written.
    rows: torch.Tensor
    positions: torch.Tensor
    #: The state, a row of the table; None if the write needs none (`zero`, `noise`).
    states: torch.Tensor | None
    #: (n, 2) the (l, l*) that the mapping takes the state between.
    pairs: torch.Tensor
    #: The factor of the mapped state; None if all are 1.
    scales: torch.Tensor | None
    #: Which states are replaced by random ones; None for none.
    random: Random | None
    #: True for the first layer that its cell writes; None if this holds for all.
    first: torch.Tensor | None


class Embedded(TypedDict):
    """Changes to the embeddings of one row."""

    #: Row in the batch.
    row: int
    #: First column of the prompt, and the one after its last.
    start: int
    end: int
    #: True if the soft prompt replaces the first embeddings.
    soft: bool
    #: Standard deviation of the noise, in units of that of the row's own embeddings; 0 for none.
    noise: float
    #: The columns that get the noise, and its seed.
    positions: list[int]
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
    read: Callable[..., dict[str, Any]]
    #: Its keyword arguments, from the kind's `lower`.
    asked: dict[str, Any]
    #: As the attributes of the kind say (see `spec.Readout`); `clean` is `looks_at_replaced`.
    unembeds: bool
    decodes: bool
    finite: list[str]
    clean: bool
    #: (n_cells,) the index of the distribution that each cell is compared with; None if none is.
    compared: torch.Tensor | None
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
    writes: dict[int, Write]
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
    #: (n_cells,) the position where each row is read, counted from the end.
    positions: torch.Tensor


class CellRows(TypedDict):
    """Where the tokens of each cell's whole prompt are in prefix and sequence: (n_cells, n_tokens)."""

    #: In the blocks that the cell's own tokens run through.
    own: torch.Tensor
    #: In the blocks before these: the tokens of the unpatched prompt.
    clean: torch.Tensor
    #: (n_cells,) the layer after which a cell's own tokens join the sequence.
    enters: torch.Tensor
    #: The first token whose keys and values each row holds; all rows share those of the tokens before it.
    first: int


class PackedProgram(TargetProgram):
    """A target pass over one sequence that holds the segments of all its cells (see `plan/layout.py`)."""

    #: Marks a packed pass.
    layout: Literal["packed"]
    #: How many blocks run.
    depth: int
    #: How many tokens run from block 0 on.
    entering: int
    #: By layer, for each token that joins after it, the index of the token whose state it starts from.
    bases: dict[int, torch.Tensor]
    #: How many tokens the step's prefix has, and how many are after it.
    prefix: int
    n_tokens: int
    #: (n_tokens,) the index of the first token of each token's own segment, to which it attends up to itself.
    starts: torch.Tensor
    #: (n_tokens,) the index of the first token of its trunk, and how many tokens of it it attends to.
    trunks: torch.Tensor
    seen: torch.Tensor
    #: The most tokens that any token attends to besides the prefix, if these are attended to separately.
    most_own: int | None
    #: (prefix + n_tokens,) the position of each token in its own prompt.
    key_positions: torch.Tensor
    #: True if a block returns a tuple.
    tuples: bool
    #: (n_cells,) the index of the token that is read.
    read: torch.Tensor
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
    #: The first rows of the table of states: states from earlier steps, or from files; None for none.
    given: torch.Tensor | None
    #: (n, vocab) next-token distributions from earlier steps; None for none.
    given_finals: torch.Tensor | None
    #: States that are sums of others; None for none.
    sums: Sums | None
    #: (n, d_model) learned embeddings that replace the first embeddings of target prompts; None for none.
    soft: torch.Tensor | None
    #: Rows of the table of states, and of that of distributions, that the step returns.
    keep: torch.Tensor
    keep_finals: torch.Tensor
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

    #: For each target pass, the raw readouts of its cells as columns: tensors or lists with an item a cell.
    passes: list[dict[str, Any]]
    #: The states named by `keep`, and the distributions named by `keep_finals`; None if there are none.
    kept: torch.Tensor | None
    kept_finals: torch.Tensor | None
    #: The keys and values of the prefix; None if they are not kept.
    prefix: Any


class PatchedRun(Protocol):
    """The input of a readout's body: a pass whose target prompts have been read, with the patch.

    Nothing after the prompts is patched, unless `target.every_step` is set.

    Attributes:
        n_cells: The number of cells. A body returns columns: {name: a tensor or a list with an item for each
            cell, in order}.
        logits: (n_cells, vocab) at the position where T is read; None for a readout that does not unembed.
        forward: M* as a function, with the keyword arguments of its own `forward`.
        plain: M* without any patch, as a function with the same arguments.
        cache: The prompts' keys and values, a row for each cell; only for a readout that decodes. It may lack
            those of a prefix that all rows share; `forward` adds them.
        mask: (n_cells, n_tokens) the prompts' attention mask, 0 for padding; only for a readout that decodes.
        finals: (n, vocab) the next-token log-probabilities that were read from M; None if there are none.
        written: What was written, with an item for each written position: `cells` (n,), which cell it belongs
            to, `states` (n, d_model), and `replaced` (n, d_model), the states that were there. An unpatched
            cell has none.
        numbered: True if `forward` takes position_ids.
        extra: More keyword arguments for a `forward` of which only the last logits are read.
        eos: Ids that end a text.
        leaving: True if rows that have ended may leave the batch.
        mixed: True if rows of different lengths may share a forward pass.
        rereads: True if `forward` reads the prompt again, and `cache` holds its ids. Its logits then begin
            with those after the last token that was read before.
        stepwise: True if tokens after the prompt are read one by one, so that none attends to a later one.
        heard: Called after each decoding step with the rows that continue and their tokens; None on servers.
    """

    n_cells: int
    logits: torch.Tensor
    forward: Callable[..., Any]
    plain: Callable[..., Any]
    cache: Any
    mask: torch.Tensor
    finals: torch.Tensor | None
    written: Mapping[str, torch.Tensor]
    numbered: bool
    extra: dict[str, Any]
    eos: list[int]
    leaving: bool
    mixed: bool
    rereads: bool
    stepwise: bool
    heard: Callable[[list[int], list[int]], None] | None
