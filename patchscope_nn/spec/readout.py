"""Readouts: what is read from the patched run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, Tag

from patchscope_nn._util.checking import NAMED, Spec
from patchscope_nn.errors import did_you_mean


def _texts(value: Any) -> Any:
    """One text stands for a list of one, and a list for a tuple; the rest is left to the type check."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _reference(value: Any) -> Any:
    return value if value == "source" else _texts(value)


class NextToken(Spec):
    """Readout: the distribution of the next token after a position of T.

    Gives `top_tokens`, `top_ids`, `top_probs` and `entropy_nats`; with a reference also
    `reference_tokens`, `reference_logprobs`, `reference_ranks` (1 is the top) and the two numbers that
    are both called surprisal: `surprisal_nats`, -log p_source(top token of the patched run), the paper's
    (section 4.1), and `nll_nats`, -log p_patched(first reference token). Where source and target share a
    vocabulary also `kl_nats`, KL(p_source || p_patched), and `source_top_ids`.

    Attributes:
        top_k: How many tokens to keep.
        reference: `source` for the source model's own next token after position i of S, unpatched; or
            texts, of which the first token counts; None for none.
        position: Where T is read; an index, -1 is the last token.
    """

    name: ClassVar[str] = "next_token"
    decodes: ClassVar[bool] = False
    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    reference: Annotated[tuple[str, ...] | Literal["source"] | None, BeforeValidator(_reference)] = None
    position: int = -1


class Generate(Spec):
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
    decodes: ClassVar[bool] = True
    max_new_tokens: Annotated[int, Field(ge=1)] = 20
    stop: Annotated[str, Field(min_length=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    relevancy: bool = False


class Choices(Spec):
    """Readout: how likely each given continuation of T is.

    Gives `choices`, `choice_logprobs` (natural log, summed over a continuation's tokens), `choice_probs`
    (these normalised over the choices) and `choice` (the most likely).

    Attributes:
        continuations: Two or more texts; `{column}` placeholders are filled by the data.
    """

    name: ClassVar[str] = "choices"
    decodes: ClassVar[bool] = True
    continuations: Annotated[tuple[str, ...], Field(min_length=2), BeforeValidator(_texts)]

    def __init__(self, continuations: Any = None, **fields: Any) -> None:
        super().__init__(continuations=continuations, **fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # as in Spec


class Hidden(Spec):
    """Readout: the state that was written, f(h), as it stands at (i*, l*) of T.

    Gives `hidden`, a list of (d_model,) vectors, one for each patched token.

    Attributes:
        clean: Give also `clean`, the states that were there.
    """

    name: ClassVar[str] = "hidden"
    decodes: ClassVar[bool] = False
    clean: bool = False


#: Each has a `name`, and says whether it `decodes`: goes on from the keys and values of the prompt.
Readout: TypeAlias = NextToken | Generate | Choices | Hidden


def read_position(readout: Readout, count: int) -> int:
    """Where a target prompt of `count` tokens is read, counted from the left."""
    return (readout.position if isinstance(readout, NextToken) else -1) % count


READOUTS: dict[str, type[Readout]] = {kind.name: kind for kind in (NextToken, Generate, Choices, Hidden)}


def _readout_tag(value: Any) -> str:
    return value.name if isinstance(value, Readout) else next(iter(value))


def _parse_readout(value: Any) -> Any:
    if isinstance(value, Readout):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if isinstance(value, Mapping) and len(value) == 1:
        name, fields = next(iter(value.items()))
        if name in READOUTS:
            return {name: {} if fields is None else fields}
        raise ValueError(f"{name!r} is no readout. {did_you_mean(str(name), list(READOUTS))}")
    raise ValueError(
        f"{value!r} is no readout; give one of {', '.join(READOUTS)}, for example generate: {{}}"
    )


def _unwrap(value: Any) -> Any:
    return value if isinstance(value, Readout) else next(iter(value.values()))


def dump_readout(readout: Readout) -> dict[str, Any]:
    """A readout as YAML holds it: `{name: fields}`."""
    return {readout.name: readout.model_dump(mode="json")}


AnyReadout = Annotated[
    Annotated[NextToken, BeforeValidator(_unwrap), Tag("next_token")]
    | Annotated[Generate, BeforeValidator(_unwrap), Tag("generate")]
    | Annotated[Choices, BeforeValidator(_unwrap), Tag("choices")]
    | Annotated[Hidden, BeforeValidator(_unwrap), Tag("hidden")],
    Discriminator(_readout_tag),
    BeforeValidator(_parse_readout),
    PlainSerializer(dump_readout),
]

NAMED.update(READOUTS)
