"""The readout `choices`: the probabilities of given continuations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from patchscope_nn.spec import ColumnType, PassCells, Readout, Tokens
from patchscope_nn.spec.forms import listed


def _continuations(value: Any) -> Any:
    return (value,) if isinstance(value, str) else listed(value)


class Choices(Readout):
    """Readout: the probability of each given continuation of T.

    Its columns are `choices`, `choice_logprobs` (natural log, summed over a continuation's tokens),
    `choice_probs` (normalised over the choices) and `choice` (the most likely).
    """

    name = "choices"
    body = "patchscope_nn.body.readouts:read_choices"
    columns: ClassVar[Mapping[str, ColumnType]] = {
        "choices": "texts",
        "choice_logprobs": "numbers",
        "choice_probs": "numbers",
        "choice": "text",
    }
    decodes = True
    appends = True
    texts_field = "continuations"
    proven = True
    finite = ("choice_probs",)
    says = "choice"
    title = "chosen option"
    action = "{} then chose one of the given answers"
    odds = ("choices", "choice_probs")

    continuations: Annotated[tuple[str, ...], Field(min_length=2), BeforeValidator(_continuations)]
    """Two or more texts; `{column}` placeholders are filled by the data."""

    def __init__(self, continuations: Any = None, **fields: Any) -> None:
        super().__init__(**{"continuations": continuations, **fields})

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # as in Spec

    @property
    def texts(self) -> tuple[str, ...]:
        """The continuations."""
        return self.continuations

    def lower(self, cells: PassCells) -> dict[str, Any]:
        """Return the arguments of `read_choices`."""
        return {"continuations": cells.continuations}

    def tabulate(
        self,
        raw: Mapping[str, Any],
        tokens: Tokens,  # noqa: ARG002 (it has the texts)
        texts: Sequence[Sequence[str]],
    ) -> dict[str, Any]:
        """Return the columns, with the choices as texts."""
        best = raw["choice_logprobs"].argmax(-1).tolist()
        chosen = [choices[place] for choices, place in zip(texts, best, strict=True)]
        return {**raw, "choices": [list(choices) for choices in texts], "choice": chosen}
