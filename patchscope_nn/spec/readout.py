"""The contract of a readout: what is read from the patched run.

A kind of readout is one class, in one file of `readouts/` or in a user's own. Everything the package needs to
know of a kind stands here: the sweep, the planner, tables and figures ask these attributes, and never which
kind it is. docs/extending/readout.md has a worked example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from patchscope_nn._util.checking import Spec
from patchscope_nn.spec.sides import Target

#: What a column of the table holds. `states` is a list of vectors; the other plurals are lists, too.
ColumnType: TypeAlias = Literal["text", "number", "integer", "texts", "numbers", "integers", "states"]


class PassCells(Protocol):
    """What a kind is told of the cells of one pass, in their order."""

    @property
    def seeds(self) -> list[int]:
        """For each cell the seed of its random numbers."""

    @property
    def prompts(self) -> list[list[int]]:
        """For each cell the token ids of T."""

    @property
    def reference_ids(self) -> list[list[int]]:
        """For each cell the first token id of each of the readout's `texts`, where these are not appended."""

    @property
    def continuations(self) -> list[list[list[int]]]:
        """For each cell the token ids of each of the readout's `texts`, where these are appended."""

    @property
    def compared(self) -> list[int]:
        """For each cell the number of its source distribution in `PatchedRun.states`; empty for none."""

    def token_ids_with(self, text: str) -> list[int]:
        """The ids of the tokens whose own text holds `text`."""


class Tokens(Protocol):
    """Token ids of the target model as text."""

    def token(self, token_id: int) -> str:
        """The text of one token."""

    def text(self, ids: Sequence[int]) -> str:
        """The text of several tokens in a row."""


class Readout(Spec):
    """The base of every kind of readout.

    A subclass declares its options as fields, sets the class attributes below where they differ from the
    defaults, and is registered by `register_readout`. Its docstring goes into the JSON Schema.

    Class attributes, what it is:
        name: Its name in YAML, in lower-case letters, digits and underscores.
        body: The function that reads it, as `module:function`. It takes a `body.program.PatchedRun`, and what
            `lower` gives as keyword arguments. It returns one dict of plain values for each cell: the raw
            readout. It is imported when a step is prepared, and travels as source to where the model runs, so
            it may use torch and functions of its own module, and nothing else.
        columns: The table's columns and what each holds. The first one belongs to this kind alone.

    Class attributes, what the planner has to know:
        unembeds: True if the body reads logits. Otherwise the forward stops at the last write, and the body
            finds in `PatchedRun.written` what was written.
        decodes: True if the body runs the model further, from the keys and values of the prompt.
        appends: True if `texts` are put behind T and scored there. Otherwise only their first tokens count.
        proven: True if the proof of a model tries this kind by name. What the proof finds wrong with any
            kind that decodes stays off for a kind that it does not try.
        finite: The raw values that are finite exactly where the model's logits are. Without any, the logits
            that the body is given are looked at instead.

    Class attributes, what figures and pages have to know:
        says: The column that says in words what the state means; empty if none does.
        title: What a figure calls that column.
        action: What the target model did, in a report's sentence; `{}` is its name.
        sentences: True if `says` is running text, and not a token or an option.
        odds: The columns of the likely answers and of their probabilities, which shade figures; or None.
        details: The columns that a page shows of a cell when it is opened.
    """

    name: ClassVar[str]
    body: ClassVar[str]
    columns: ClassVar[Mapping[str, ColumnType]]

    unembeds: ClassVar[bool] = True
    decodes: ClassVar[bool] = False
    appends: ClassVar[bool] = False
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
        """Where T is read: a position, -1 is the last token."""
        return -1

    @property
    def decoded(self) -> int:
        """The most tokens that are decoded for one cell."""
        return 0

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts that go to the body as token ids; a data row fills their `{column}` placeholders."""
        return ()

    @property
    def texts_field(self) -> str:
        """The field that holds `texts`, for messages."""
        return "texts"

    @property
    def from_source(self) -> bool:
        """True if the readout needs the source model's own next-token distribution.

        With `texts` that are not appended it is read too, wherever both models share a vocabulary.
        """
        return False

    @property
    def runs_unpatched(self) -> bool:
        """True if the body also runs T without the patch."""
        return False

    @property
    def looks_at_replaced(self) -> bool:
        """True if the body looks at the states that the write replaced."""
        return False

    @property
    def given(self) -> tuple[str, ...]:
        """The columns that it gives with its present options, in order."""
        return tuple(self.columns)

    def check_target(self, target: Target) -> None:
        """Check that the readout goes together with a target.

        Raises:
            ValueError: It does not.
        """

    def lower(self, cells: PassCells) -> dict[str, Any]:  # noqa: ARG002 (a kind without options needs nothing)
        """What the body takes besides the run, in plain values."""
        return {}

    def tabulate(self, raw: Mapping[str, Any], tokens: Tokens, texts: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002 (for kinds that name tokens)
        """One cell's columns.

        Args:
            raw: What the body returned for the cell.
            tokens: Token ids as text.
            texts: The readout's appended `texts`, filled by the cell's data row.

        Returns:
            The columns of `given`, by name.
        """
        return {name: raw.get(name) for name in self.given}


def read_position(readout: Readout, count: int) -> int:
    """Where a target prompt of `count` tokens is read, counted from the left."""
    return readout.reads_at % count
