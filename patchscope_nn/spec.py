"""The object: a Patchscope, as frozen data with the same field names in Python and in YAML.

A Patchscope takes the hidden state at (source prompt S, position i, layer l, model M), maps it by f, and
writes it at (target prompt T, position i*, layer l*, model M*); the readout is what M* then says
(Ghandeharioun et al. 2024, arXiv 2401.06102, section 3.1).

Nothing here imports torch, so a recipe can be checked in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WithJsonSchema,
)
from pydantic import ValidationError as _ValidationError

from patchscope_nn.errors import Problem, SpecError, did_you_mean
from patchscope_nn.layers import SourceLayers, TargetLayers
from patchscope_nn.positions import Positions
from patchscope_nn.prompts import Prompt

#: What of a block is read or written: its output, or the output of its attention or its MLP.
Site: TypeAlias = Literal["residual", "attention", "mlp"]
#: `unpatched`: T as it is. `random`: a random state of the same norm. `shuffled`: another row's state.
Control: TypeAlias = Literal["unpatched", "random", "shuffled"]


def _texts(value: Any) -> Any:
    """One text stands for a list of one, and a list for a tuple; the rest is left to the type check."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _reference(value: Any) -> Any:
    return value if value == "source" else _texts(value)


class Spec(BaseModel):
    """The base of all specification objects: frozen, keyword-only, closed to unknown fields.

    Raises:
        SpecError: On construction, with every problem at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except _ValidationError as error:
            raise SpecError(problems(error, type(self)), origin=type(self).__name__) from None

    # Tells pydantic that nested objects may be built without this method, so that one error collects all.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic's own marker


class Source(Spec):
    """Where the hidden state is taken: S, i, l and M.

    Attributes:
        prompt: S: a text, chat messages, or token ids; `{column}` placeholders are filled by the data.
        position: i: an index, a text of the prompt, a span, a list, or `{each: ...}`.
        layer: l: a block, a list, a range, `all` or `embed`.
        site: `residual` (the block's output), `attention` or `mlp`.
        model: M: a Hugging Face id, a folder, or `builtin:...`; None takes the run's model.
    """

    prompt: Prompt
    position: Positions = -1
    layer: SourceLayers = "all"
    site: Site = "residual"
    model: str | None = None


class Target(Spec):
    """Where the mapped state is written: T, i*, l* and M*.

    Attributes:
        prompt: T, as in `Source`; None is the source's own prompt (T = S).
        position: i*, as in `Source`; None is the source's own position where T = S, else the last token.
        layer: l*, as in `Source`; `same` pairs l* with l, anything else is crossed with it.
        site: `residual`, `attention` or `mlp`.
        model: M*; None is the source's model.
    """

    prompt: Prompt | None = None
    position: Positions | None = None
    layer: TargetLayers = "same"
    site: Site = "residual"
    model: str | None = None


class NextToken(Spec):
    """Readout: the distribution of the next token after a position of T.

    Gives `top_tokens`, `top_ids`, `top_probs` and `entropy_nats`; with a reference also
    `reference_tokens`, `reference_logprobs`, `reference_ranks` (1 is the top) and the two numbers that
    are both called surprisal: `surprisal_nats`, -log p_source(top token of the patched run), the paper's
    (section 4.1), and `nll_nats`, -log p_patched(first reference token).

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
    """

    name: ClassVar[str] = "generate"
    decodes: ClassVar[bool] = True
    max_new_tokens: Annotated[int, Field(ge=1)] = 20
    stop: Annotated[str, Field(min_length=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0


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
    """

    name: ClassVar[str] = "hidden"
    decodes: ClassVar[bool] = False


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

#: The mappings with a name; the others are `{affine: file}`, `{fitted: file}`, ... or Python objects.
NAMED_MAPPINGS = ("identity", "target_norm")
_MAPPING_KEYS = ("affine", "function", "fitted", "tuned_lens", "jacobian_lens")


def _parse_mapping(value: Any) -> Any:
    if callable(value) or value in NAMED_MAPPINGS:
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        key, item = next(iter(value.items()))
        if key in _MAPPING_KEYS and isinstance(item, str) and item:
            if key == "function" and item.count(":") != 1:
                raise ValueError(f"function: {item!r} should read module:name, for example my_maps:rotate")
            return (key, item)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in _MAPPING_KEYS:  # noqa: PLR2004 (key, item)
        return value
    names = [*NAMED_MAPPINGS, *_MAPPING_KEYS]
    name = next(iter(value), "") if isinstance(value, Mapping) else str(value)
    raise ValueError(
        f"{value!r} is no mapping. {did_you_mean(str(name), names)} Write {{affine: weights.safetensors}}, "
        "{fitted: fit.safetensors}, {function: module:name}, or give a torch module or function in Python."
    )


def dump_mapping(value: Any) -> Any:
    """A mapping as YAML holds it; a Python object by its qualified name."""
    if isinstance(value, tuple):
        return {value[0]: value[1]}
    if isinstance(value, str):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    return {"python": f"{named.__module__}:{named.__qualname__}"}


AnyMapping = Annotated[
    Any,
    BeforeValidator(_parse_mapping),
    PlainSerializer(dump_mapping),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(NAMED_MAPPINGS)},
                *(
                    {
                        "type": "object",
                        "properties": {key: {"type": "string"}},
                        "required": [key],
                        "additionalProperties": False,
                    }
                    for key in _MAPPING_KEYS
                ),
            ]
        }
    ),
]


class Patchscope(Spec):
    """A Patchscope: (S, i, l, M) --f--> (T, i*, l*, M*), and what is read from the patched run.

    Attributes:
        source: Where the hidden state is taken.
        target: Where it is written.
        mapping: f: `identity`, `target_norm` (scaled to the norm of the state it replaces),
            `{affine: file.safetensors}`, `{fitted: file.safetensors}`, a published lens as
            `{tuned_lens: folder}` or `{jacobian_lens: file.pt}`, `{function: module:name}`, or in Python an
            `Affine`, a `Fitted`, a torch module or a function from (..., d_model) to (..., d_model of the
            target).
        readout: What is read from the patched run.
    """

    source: Source
    target: Target = Target()
    mapping: AnyMapping = "identity"
    readout: AnyReadout = NextToken()


def problems(error: _ValidationError, model: type[BaseModel]) -> list[Problem]:
    """What pydantic found wrong, in the house's words.

    Args:
        error: Pydantic's error.
        model: The model that was being built, for the names it allows.

    Returns:
        One problem for each wrong field.
    """
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        *above, last = detail["loc"] or ("",)
        # An unknown field is spelt as the user spelt it, with any marks it has.
        given = (last,) if detail["type"] == "extra_forbidden" or _is_name(last) else ()
        loc = (*filter(_is_name, above), *given)
        field = ".".join(str(part) for part in loc)
        found.setdefault(field, Problem(field=field, message=_message(detail, loc, model)))
    return list(found.values())


def _is_name(part: int | str) -> bool:
    """Pydantic adds the names of its own validators to a path; a field has none of these marks."""
    return isinstance(part, int) or not any(mark in part for mark in "[(-")


def _message(detail: Any, loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"is no field here. {did_you_mean(str(loc[-1]), _fields(model, loc[:-1]))}"
    if kind == "missing":
        return "is required and was not given"
    text = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return text
    shown = repr(given)
    if kind == "literal_error":
        allowed = _QUOTED.findall(detail["ctx"]["expected"])
        return f"{shown} is not allowed here. {did_you_mean(str(given), allowed)}"
    text = _YAML_WORDS.get(kind, text)
    return f"{text[0].lower()}{text[1:]}; given {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}"


_SHOWN = 80
_QUOTED = re.compile(r"'([^']*)'")
#: Pydantic speaks of Python's types; the user may be writing YAML.
_YAML_WORDS = {
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping of fields",
    "tuple_type": "should be a list",
}


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The fields allowed at a path below a model."""
    for part in path:
        if part in READOUTS:
            model = READOUTS[str(part)]
            continue
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[str(part)].annotation
        nested = [kind for kind in (annotation, *get_args(annotation)) if _is_model(kind)]
        model = nested[0] if len(nested) == 1 else model
    return list(model.model_fields)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
