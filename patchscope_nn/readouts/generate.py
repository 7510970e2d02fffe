"""The readout `generate`: the text that the patched model generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from patchscope_nn.spec import ColumnType, PassCells, Readout, Target, Tokens


class Generate(Readout):
    """Readout: the text that the patched model generates after T. Only T is patched, not the decoded tokens.

    Its columns are `text` and `stopped` (`stop`, `eos` or `length`).
    """

    name = "generate"
    body = "patchscope_nn.body.readouts:read_generate"
    columns: ClassVar[Mapping[str, ColumnType]] = {
        "text": "text",
        "stopped": "text",
        "token_probs": "numbers",
        "unpatched_token_probs": "numbers",
    }
    decodes = True
    proven = True
    finite = ("sound",)
    says = "text"
    title = "generated text"
    action = "{} then continued the text"
    sentences = True
    details = ("stopped",)

    max_new_tokens: Annotated[int, Field(ge=1)] = 20
    """The maximum number of tokens to decode."""
    stop: Annotated[str, Field(min_length=1)] | None = None
    """A text that ends the generation; it is not part of `text`."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """0 decodes greedily; above 0 samples, with noise that depends only on the seed and the cell, never on
    the batch."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of sampling."""
    relevancy: bool = False
    """Add the columns `token_probs`, the probability of each decoded token, and `unpatched_token_probs`, its
    probability without the patch (Chen et al. 2024, arXiv 2403.10949, section 3.2)."""

    @property
    def decoded(self) -> int:
        """The maximum number of tokens to decode."""
        return self.max_new_tokens

    @property
    def runs_unpatched(self) -> bool:
        """True if the tokens' probabilities without the patch are needed."""
        return self.relevancy

    @property
    def given(self) -> tuple[str, ...]:
        """The columns of the text and, with `relevancy`, of the probabilities of its tokens."""
        return tuple(self.columns) if self.relevancy else ("text", "stopped")

    def check_target(self, target: Target) -> None:
        """Check that `relevancy` is not used with a target that changes T in other ways than by the patch.

        Raises:
            ValueError: It is.
        """
        if self.relevancy and (target.corrupt or target.soft_prompt or target.cut):
            raise ValueError(
                "readout.generate.relevancy compares with T unpatched, but target.corrupt, "
                "target.soft_prompt and target.write: cut change T; leave out one or the other"
            )

    def lower(self, cells: PassCells) -> dict[str, Any]:
        """Return the arguments of `read_generate`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "stops": cells.token_ids_with(self.stop) if self.stop else [],
            "temperature": self.temperature,
            "seeds": cells.seeds,
            "prompts": cells.prompts if self.relevancy else None,
        }

    def tabulate(
        self, raw: Mapping[str, Any], tokens: Tokens, texts: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        """Return the columns. A text ends before the stop string, even inside a token."""
        whole = tokens.texts(raw["token_ids"])
        texts = [cut(text, self.stop) for text in whole]
        ends = zip(texts, whole, raw["stopped"], strict=True)
        stopped = [reason if text == before else "stop" for text, before, reason in ends]
        return {**raw, "text": texts, "stopped": stopped}


def cut(text: str, stop: str | None) -> str:
    """Return a decoded text up to its stop string."""
    return text.partition(stop)[0] if stop else text
