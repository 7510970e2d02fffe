"""The readout `next_token`: the distribution of the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from patchscope_nn.spec import ColumnType, PassCells, Readout, Tokens
from patchscope_nn.spec.forms import listed


def _reference(value: Any) -> Any:
    return (value,) if isinstance(value, str) and value != "source" else listed(value)


#: In a recipe, a single text is allowed in place of a list. `source` is a text too.
_REFERENCE_SCHEMA = {
    "anyOf": [{"items": {"type": "string"}, "type": "array"}, {"type": "string"}, {"type": "null"}]
}


class NextToken(Readout):
    """Readout: the distribution of the next token after a position of T.

    Its columns are `top_tokens`, `top_ids`, `top_probs` and `entropy_nats`. A reference adds
    `reference_tokens`, `reference_logprobs`, `reference_ranks` (1 is the top) and two numbers that are both
    called surprisal in the literature: `surprisal_nats`, -log p_source(top token of the patched run), as in
    the paper (section 4.1), and `nll_nats`, -log p_patched(first reference token). If source and target share
    a vocabulary, it also adds `kl_nats`, KL(p_source || p_patched), and `source_top_ids`.
    """

    name = "next_token"
    body = "patchscope_nn.body.readouts:read_next_token"
    columns: ClassVar[Mapping[str, ColumnType]] = {
        "top_tokens": "texts",
        "top_ids": "integers",
        "top_probs": "numbers",
        "entropy_nats": "number",
        "reference_tokens": "texts",
        "reference_ids": "integers",
        "reference_logprobs": "numbers",
        "reference_ranks": "integers",
        "surprisal_nats": "number",
        "nll_nats": "number",
        "kl_nats": "number",
        "source_top_ids": "integers",
    }
    texts_field = "reference"
    proven = True
    finite = ("entropy_nats",)
    says = "top_tokens"
    title = "top next token"
    action = "{} then predicted the next token"
    odds = ("top_tokens", "top_probs")
    details = ("entropy_nats", "surprisal_nats", "nll_nats", "reference_tokens")

    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    """The number of top tokens to keep."""
    reference: Annotated[
        tuple[str, ...] | Literal["source"] | None,
        BeforeValidator(_reference),
        WithJsonSchema(_REFERENCE_SCHEMA),
    ] = None
    """`source` takes the source model's own next token after position i of S, unpatched; texts take their
    first tokens; None takes no reference."""
    position: int = -1
    """The index of the token of T after which the distribution is read; -1 is the last."""

    @property
    def reads_at(self) -> int:
        """The position of T that is read."""
        return self.position

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts whose first tokens are the reference."""
        return self.reference if isinstance(self.reference, tuple) else ()

    @property
    def from_source(self) -> bool:
        """True if the reference is the source's own next token."""
        return self.reference == "source"

    def lower(self, cells: PassCells) -> dict[str, Any]:
        """Return the arguments of `read_next_token`."""
        return {
            "top_k": self.top_k,
            "references": cells.reference_ids,
            "compared": cells.compared,
            "from_source": self.from_source,
        }

    def tabulate(
        self,
        raw: Mapping[str, Any],
        tokens: Tokens,
        texts: Sequence[Sequence[str]],  # noqa: ARG002 (none is appended)
    ) -> dict[str, Any]:
        """Return the columns, with the texts of token ids."""
        sides = [side for side in ("top", "reference") if f"{side}_ids" in raw]
        return {**raw, **{f"{side}_tokens": tokens.tokens(raw[f"{side}_ids"]) for side in sides}}
