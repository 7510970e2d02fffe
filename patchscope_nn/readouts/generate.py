"""The text the patched model goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from patchscope_nn.spec import ColumnType, PassCells, Readout, Target, Tokens


class Generate(Readout):
    """Readout: the text the patched model goes on with; T is patched only while it is read.

    Gives `text` and `stopped` (`stop`, `eos` or `length`).

    Attributes:
        max_new_tokens: The most tokens to decode.
        stop: Text that ends the generation; it is left out of `text`.
        temperature: 0 decodes greedily; above 0 samples, with noise that depends only on the seed and
            the cell, never on the batch.
        seed: The seed of sampling.
        relevancy: Give also `token_probs`, how likely each decoded token was, and `unpatched_token_probs`,
            how likely it is for T without the patch (Chen et al. 2024, arXiv 2403.10949, section 3.2).
    """

    name: ClassVar[str] = "generate"
    body: ClassVar[str] = "patchscope_nn.body.readouts:read_generate"
    columns: ClassVar[Mapping[str, ColumnType]] = {
        "text": "text",
        "stopped": "text",
        "token_probs": "numbers",
        "unpatched_token_probs": "numbers",
    }
    decodes: ClassVar[bool] = True
    proven: ClassVar[bool] = True
    finite: ClassVar[tuple[str, ...]] = ("sound",)
    says: ClassVar[str] = "text"
    title: ClassVar[str] = "generated text"
    action: ClassVar[str] = "{} then continued the text"
    sentences: ClassVar[bool] = True
    details: ClassVar[tuple[str, ...]] = ("stopped",)

    max_new_tokens: Annotated[int, Field(ge=1)] = 20
    stop: Annotated[str, Field(min_length=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    relevancy: bool = False

    @property
    def decoded(self) -> int:
        """The most tokens to decode."""
        return self.max_new_tokens

    @property
    def runs_unpatched(self) -> bool:
        """True if the tokens' probabilities without the patch are asked for."""
        return self.relevancy

    @property
    def given(self) -> tuple[str, ...]:
        """The text, and where they are asked for the probabilities of its tokens."""
        return tuple(self.columns) if self.relevancy else ("text", "stopped")

    def check_target(self, target: Target) -> None:
        """Check that T as it is can be run, where the text is compared with it.

        Raises:
            ValueError: It cannot.
        """
        if self.relevancy and (target.corrupt or target.soft_prompt or target.cut):
            raise ValueError(
                "readout.generate.relevancy compares with T as it is, which target.corrupt, "
                "target.soft_prompt and target.write: cut change; leave out one or the other"
            )

    def lower(self, cells: PassCells) -> dict[str, Any]:
        """What `read_generate` takes."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "stops": cells.token_ids_with(self.stop) if self.stop else [],
            "temperature": self.temperature,
            "seeds": cells.seeds,
            "prompts": cells.prompts if self.relevancy else None,
        }

    def tabulate(self, raw: Mapping[str, Any], tokens: Tokens, texts: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002 (no texts are appended)
        """One cell's columns; the text ends before the stop string, wherever the tokens' borders fall."""
        whole = tokens.text(raw["token_ids"])
        text = cut(whole, self.stop)
        said = {"text": text, "stopped": raw["stopped"] if text == whole else "stop"}
        return {name: said.get(name, raw.get(name)) for name in self.given}


def cut(text: str, stop: str | None) -> str:
    """A decoded text up to its stop string."""
    return text.partition(stop)[0] if stop else text
