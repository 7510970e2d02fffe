"""How a mapped state is written, and other changes to T: the modes of `Target`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from patchscope_nn._util.checking import NAMED, Spec
from patchscope_nn.errors import did_you_mean
from patchscope_nn.spec.forms import array, closed, floats, is_number
from patchscope_nn.spec.positions import POSITIONS_SCHEMA, Positions


class Cut(Spec):
    """Attention edges that are cut: from block l* on, the token at i* does not attend to these tokens."""

    position: Positions
    """The tokens that i* does not attend to, as in `Target.position`."""


class Corrupt(Spec):
    """Noise on T's embeddings in every run, before anything is written (Meng et al. 2022, section 2.1)."""

    position: Positions
    """The tokens whose embeddings get noise."""
    noise: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    """The standard deviation of the noise, in standard deviations of all numbers in T's embeddings."""
    samples: Annotated[int, Field(ge=1)] = 1
    """The number of draws of noise; each makes a cell."""


#: The writes without parameters; the others are `{blend: alpha}`, `{noise: sigma}`, `{cut: {position: ...}}`.
NAMED_WRITES = ("replace", "add", "add_matched", "zero")
AnyWrite: TypeAlias = str | tuple[Literal["blend", "noise"], float] | tuple[Literal["cut"], Cut]
Scale: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]


def _write(value: Any) -> Any:
    if value in NAMED_WRITES or isinstance(value, tuple):
        return value
    names = [*NAMED_WRITES, "blend", "noise", "cut"]
    if isinstance(value, Mapping) and len(value) == 1:
        name, item = next(iter(value.items()))
        if name in ("blend", "noise"):
            if is_number(item) and item >= 0 and (name == "noise" or item <= 1):
                return (name, float(item))
            allowed = "in 0..1" if name == "blend" else "of at least 0"
            raise ValueError(f"{name}: {item!r} should be a number {allowed}")
        if name == "cut" and isinstance(item, Mapping) and set(item) == {"position"}:
            return ("cut", Cut(position=item["position"]))
    name = next(iter(value), "") if isinstance(value, Mapping) else str(value)
    raise ValueError(
        f"{value!r} is not a valid write. {did_you_mean(str(name), names)} Give {', '.join(NAMED_WRITES)}, "
        "{blend: 0.5}, {noise: 3} or {cut: {position: ...}}."
    )


def _dump_write(value: Any) -> Any:
    if isinstance(value, str):
        return value
    name, item = value
    return {name: item.model_dump(mode="json") if isinstance(item, Cut) else item}


_FORMS: list[dict[str, Any]] = [
    {"enum": list(NAMED_WRITES)},
    closed(blend={"type": "number", "minimum": 0, "maximum": 1}),
    closed(noise={"type": "number", "minimum": 0}),
    closed(cut=closed(position=POSITIONS_SCHEMA)),
]
#: The type of `Target.write`.
Write = Annotated[
    AnyWrite, BeforeValidator(_write), PlainSerializer(_dump_write), WithJsonSchema({"anyOf": _FORMS})
]
NAMED["cut"] = Cut

#: The type of `Target.scale`: one number or several, by which f(h) is multiplied.
Scales = Annotated[
    tuple[Scale, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: floats([value] if is_number(value) else value)),
    WithJsonSchema({"anyOf": [{"type": "number"}, array({"type": "number"})]}),
]
