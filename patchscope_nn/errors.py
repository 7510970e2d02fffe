"""The exceptions of patchscope_nn, each with a hint that says what to do next.

PatchscopeError
├── InputError            something given is wrong; the command line exits with 2
│   ├── SpecError         fields of a Patchscope or recipe, with all their problems
│   ├── PositionError     a position that does not name a token of its prompt
│   ├── LayerError        a layer that the model does not have
│   ├── MappingError      a mapping that does not fit between the two hidden spaces
│   ├── ModelError        a model that cannot be found, or is not a decoder
│   ├── DataError         data that cannot be read, is empty, or lacks a column
│   └── FolderError       a run folder that belongs to something else
└── RunError              the run itself failed; the command line exits with 1
    ├── ServerError       a server cannot be reached, or does not answer in time; repeat the call
    └── JobError          a server ran a job, and it failed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class PatchscopeError(Exception):
    """The base of every error this package raises on purpose.

    Args:
        message: What was given and what is allowed.
        hint: What to do next; printed after the message.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message} {hint}".strip())


class InputError(PatchscopeError):
    """Something the user gave is wrong, and the user can correct it."""


class PositionError(InputError):
    """A position does not name a token of its prompt."""


class LayerError(InputError):
    """A layer lies outside the model."""


class MappingError(InputError):
    """A mapping does not fit between the source's hidden space and the target's."""


class ModelError(InputError):
    """A model cannot be found, loaded, or used as a decoder."""


class DataError(InputError):
    """Data cannot be read, is empty, or lacks a column."""


class FolderError(InputError):
    """A run folder cannot be used for this run."""


class RunError(PatchscopeError):
    """The run started and then failed."""


class ServerError(RunError):
    """A server cannot be reached, or does not answer in time."""


class JobError(RunError):
    """A server ran a job, and it failed; the message is the server's."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with one field.

    Attributes:
        field: The dotted path of the field, for example `source.layer`.
        message: What was given, what is allowed and what to do.
        line: The line of the YAML file, counted from 1; None if the field is not from a file.
    """

    field: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.field}: {self.message}" if self.field else f"{where}{self.message}"


class SpecError(InputError):
    """All the problems of a specification, reported at once.

    Attributes:
        problems: The problems, in the order of the file.
        origin: The name of the file, class or function that was checked; empty if there is none.
    """

    def __init__(self, problems: Iterable[Problem], *, origin: str = "") -> None:
        self.problems = tuple(problems)
        self.origin = origin
        head = f"{origin}: " if origin else ""
        if len(self.problems) == 1:
            super().__init__(f"{head}{self.problems[0]}")
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            super().__init__(f"{head}{len(self.problems)} problems{lines}")


def did_you_mean(given: str, allowed: Sequence[str]) -> str:
    """Suggest the nearest allowed name, and list all allowed names.

    Args:
        given: The name that is not allowed.
        allowed: The allowed names.

    Returns:
        For example `Did you mean 'layer'? Allowed: layer, model.`; `There are none.` if `allowed` is empty.
    """
    if not allowed:
        return "There are none."
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    start = f"Did you mean {near[0]!r}? " if near else ""
    return f"{start}Allowed: {', '.join(allowed)}."
