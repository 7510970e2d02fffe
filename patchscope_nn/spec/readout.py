"""The contract of a readout, which reads a result from the patched run.

A kind of readout is a class, in a file of `readouts/` or of a user. The sweep, the planner, tables and
figures use only the attributes that are defined here, and never test which kind it is.
docs/extending/readout.md has a worked example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from patchscope_nn._util.checking import Spec
from patchscope_nn.spec.sides import Target

#: The type of a table column's values. `states` is a list of vectors; the other plurals are lists too.
ColumnType: TypeAlias = Literal["text", "number", "integer", "texts", "numbers", "integers", "states"]


class PassCells(Protocol):
    """What `Readout.lower` knows about the cells of a pass, in their order."""

    @property
    def seeds(self) -> list[int]:
        """The seed of each cell's random numbers."""

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each cell's T."""

    @property
    def reference_ids(self) -> Any:
        """(n_cells, n_texts) tensor: the first token of each of the `texts`, if these are not appended."""

    @property
    def continuations(self) -> list[list[list[int]]]:
        """For each cell the token ids of each of the readout's `texts`, if these are appended."""

    @property
    def compared(self) -> Any:
        """(n_cells,) the index of each source distribution in `PatchedRun.finals`; None if not needed."""

    def token_ids_with(self, text: str) -> list[int]:
        """Return the ids of the tokens whose text contains `text`."""


class Tokens(Protocol):
    """Token ids of the target model as text."""

    def token(self, token_id: int) -> str:
        """Return the text of one token."""

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of tokens."""


class Readout(Spec):
    """The base class of every kind of readout.

    A subclass declares its options as fields, sets those class attributes below that differ from the
    defaults, and is registered by `register_readout`. Its docstring becomes part of the JSON Schema.

    Class attributes, definition:
        name: Its name in YAML, in lower-case letters, digits and underscores.
        body: The function that reads it, as `module:function`. It takes a `body.program.PatchedRun` and the
            values of `lower` as keyword arguments, and returns columns: {name: a tensor or a list with an
            item for each cell}. It is imported when a step is prepared, and its source is sent to where the
            model runs. So it may use only torch and functions of its own module.
        columns: The table's columns and their types. No other kind may have the first column.

    Class attributes, for the planner:
        unembeds: True if the body reads logits. Otherwise the forward pass stops at the last write, and the
            body finds the written states in `PatchedRun.written`.
        decodes: True if the body continues the forward pass from the keys and values of the prompt.
        appends: True if `texts` are appended to T and scored. Otherwise only their first tokens are used.
        texts_field: The name of the field of `texts`, for messages.
        proven: True if the proof of a model tests this kind by name. For a kind that is not tested, the
            optimisations are off that failed for any kind that decodes.
        finite: The raw values that are finite exactly if the model's logits are. If it is empty, the logits
            that the body receives are checked instead.

    Class attributes, for figures and pages:
        says: The column that says in words what the state means; empty if there is none.
        title: What a figure calls that column.
        action: What the target model did, in a report's sentence; `{}` is its name.
        sentences: True if `says` is running text, not a token or an option.
        odds: The columns of likely answers and of their probabilities, which shade figures; or None.
        details: The columns that a page shows when a cell is opened.
    """

    name: ClassVar[str]
    body: ClassVar[str]
    columns: ClassVar[Mapping[str, ColumnType]]

    unembeds: ClassVar[bool] = True
    decodes: ClassVar[bool] = False
    appends: ClassVar[bool] = False
    texts_field: ClassVar[str] = "texts"
    proven: ClassVar[bool] = False
    finite: ClassVar[tuple[str, ...]] = ()

    says: ClassVar[str] = ""
    title: ClassVar[str] = ""
    action: ClassVar[str] = "{} then ran"
    sentences: ClassVar[bool] = False
    odds: ClassVar[tuple[str, str] | None] = None
    details: ClassVar[tuple[str, ...]] = ()

    @property
    def reads_at(self) -> int:
        """The position of T that is read; -1 is the last token."""
        return -1

    @property
    def decoded(self) -> int:
        """The maximum number of tokens decoded for a cell."""
        return 0

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts that the body receives as token ids. A data row fills their `{column}` placeholders."""
        return ()

    @property
    def from_source(self) -> bool:
        """True if the readout needs the source model's own next-token distribution.

        The distribution is also read if there are `texts` that are not appended and both models share a
        vocabulary.
        """
        return False

    @property
    def runs_unpatched(self) -> bool:
        """True if the body also runs T without the patch."""
        return False

    @property
    def looks_at_replaced(self) -> bool:
        """True if the body reads the states that the write replaced."""
        return False

    @property
    def given(self) -> tuple[str, ...]:
        """The columns that it fills with its present options, in order."""
        return tuple(self.columns)

    def check_target(self, target: Target) -> None:
        """Check that the readout is compatible with a target.

        Raises:
            ValueError: It is not.
        """

    def lower(self, cells: PassCells) -> dict[str, Any]:  # noqa: ARG002 (a kind without options needs nothing)
        """Return the body's keyword arguments, as plain values."""
        return {}

    def tabulate(self, raw: Mapping[str, Any], tokens: Tokens, texts: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002 (for kinds that name tokens)
        """Return a cell's columns.

        Args:
            raw: The cell's item of each of the body's columns, as plain values.
            tokens: Converts token ids to text.
            texts: The readout's appended `texts`, filled by the cell's data row.

        Returns:
            The values of the columns in `given`, by name.
        """
        return {name: raw.get(name) for name in self.given}


def read_position(readout: Readout, count: int) -> int:
    """Return the position at which a target prompt of `count` tokens is read, counted from the left."""
    return readout.reads_at % count
