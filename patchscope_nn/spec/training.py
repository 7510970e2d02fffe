"""The options of a mapping that is trained through a model before the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import Field, model_validator

from patchscope_nn._util.checking import NAMED, Spec

#: Kinds that map to the last block of the same model, and are fitted on texts.
LensKind: TypeAlias = Literal["tuned_lens", "jacobian_lens"]
#: Kinds that are trained to make a text likely after T.
TextKind: TypeAlias = Literal["trained_scale", "trained_scalar_affine", "trained_low_rank", "trained_affine"]
TrainKind: TypeAlias = Literal[LensKind, "lre", TextKind]
LENS_KINDS: tuple[str, ...] = get_args(LensKind)
TRAIN_KINDS: tuple[str, ...] = get_args(TrainKind)

_COMMON = ("kind", "data", "limit", "seed")
_STEPS = ("steps", "batch", "learning_rate", "held_out")
_TEXT = ("text", *_STEPS)
#: The fields of each kind, in addition to the common ones.
_FIELDS: dict[str, tuple[str, ...]] = {
    "tuned_lens": ("column", "max_tokens", "skip_first", *_STEPS),
    "jacobian_lens": ("column", "max_tokens", "skip_first", "held_out"),
    "lre": ("prompt", "subject", "subjects", "rank", "beta"),
    **dict.fromkeys(get_args(TextKind), _TEXT),
    "trained_low_rank": (*_TEXT, "rank"),
}
#: The fields that a kind requires.
_NEEDED = {"lre": ("data", "prompt", "subject"), **dict.fromkeys(get_args(TextKind), ("data", "text"))}

_LRE_EXAMPLE = "{kind: lre, data: {file: a.jsonl}, prompt: 'The capital of {country} is', subject: country}"
_TEXT_EXAMPLE = "{kind: trained_affine, data: {file: a.jsonl}, text: ' {description}'}"

_Count: TypeAlias = Annotated[int, Field(ge=1)]
_Words: TypeAlias = Annotated[str, Field(min_length=1)]


class Train(Spec):
    """A mapping that is trained through the model before the run, for the layers the run needs, and cached.

    A field that is None takes the kind's own default, which `patchscope fit KIND --help` shows.
    """

    kind: TrainKind
    """`tuned_lens`, `jacobian_lens` or `lre` map to the last block, so l* is -1. `trained_scale`,
    `trained_scalar_affine`, `trained_low_rank` and `trained_affine` make `text` likely after the recipe's T
    with f(h) in it; they use the recipe's S, T, i and i*."""
    data: dict[str, Any] | None = None
    """The training data, as a recipe's `data`; if it is None, the lenses take texts that ship."""
    column: _Words | None = None
    """The column of the texts, for the lenses; None takes the only one."""
    limit: _Count | None = None
    """The maximum number of rows; None reads all."""
    text: _Words | None = None
    """The text that should follow T, for the `trained_` kinds: `" {description}"`."""
    prompt: _Words | None = None
    """The sentence that states the relation, for `lre`: `The capital of {country} is`."""
    subject: _Words | None = None
    """The column of the relation's subjects, for `lre`."""
    subjects: _Count | None = None
    """The number of subjects `lre` is fitted on; the reported numbers are measured on the others."""
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The factor of the slope of `lre`; None chooses one for each layer."""
    rank: _Count | None = None
    """The rank of `trained_low_rank`, or of the slope of `lre`."""
    steps: _Count | None = None
    """The number of optimiser steps."""
    batch: _Count | None = None
    """The size of a step: tokens for `tuned_lens`, rows for the `trained_` kinds."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The initial learning rate."""
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The fraction of the data that is used only to measure the reported numbers."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """The maximum number of tokens the lenses read of a text."""
    skip_first: Annotated[int, Field(ge=0)] | None = None
    """The number of tokens at the beginning of a text that the lenses skip."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of what is held out, of the order of the data, and of random initial values."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        own = _FIELDS[self.kind]
        set_fields = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if other := [name for name in set_fields if name not in (*_COMMON, *own)]:
            raise ValueError(
                f"{self.kind} does not take {' or '.join(other)}; leave it out. "
                f"Its own fields are {', '.join(own)}."
            )
        if lacking := [name for name in _NEEDED.get(self.kind, ()) if name not in set_fields]:
            example = _LRE_EXAMPLE if self.kind == "lre" else _TEXT_EXAMPLE
            raise ValueError(f"{self.kind} needs {' and '.join(lacking)}, as in {example}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The fields of its kind that are not None."""
        return {name: value for name in _FIELDS[self.kind] if (value := getattr(self, name)) is not None}


NAMED["train"] = Train
