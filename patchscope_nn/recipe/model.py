"""The recipe as data: a Patchscope, what fills it, what is measured and what it is compared with."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
)

from patchscope_nn.data import DataSpec
from patchscope_nn.errors import SpecError
from patchscope_nn.metrics import METRICS, MetricUse, check_metrics, parse_metric
from patchscope_nn.spec import (
    AnyMapping,
    AnyReadout,
    Control,
    Fit,
    NextToken,
    Patchscope,
    Source,
    Spec,
    Target,
)

_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


def _slug(name: str) -> str:
    if not _SLUG.fullmatch(name):
        raise ValueError(
            f"{name!r} is no recipe name; use lower-case letters and digits, with single hyphens between "
            "words: my-recipe"
        )
    return name


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [value.name if isinstance(value, MetricUse) else value for value in values]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"names {twice[0]} twice; each makes one column or kind of cell, so name it once")
    return values


def _metric(value: Any, info: ValidationInfo) -> MetricUse:
    use = parse_metric(value)
    # The readout is checked before the metrics; it is missing here where it is wrong itself.
    found = check_metrics([use], info.data["readout"]) if "readout" in info.data else []
    if found:
        raise ValueError(found[0])
    return use


def _metric_schema() -> dict[str, Any]:
    def named(name: str, parameters: tuple[str, ...]) -> dict[str, Any]:
        inner = _closed({one: {"type": "string"} for one in parameters})
        return {"title": METRICS[name].title, **_closed({name: inner})}

    bare = [name for name, metric in METRICS.items() if not metric.parameters]
    whole = [named(name, metric.parameters) for name, metric in METRICS.items()]
    return {"anyOf": [{"enum": bare}, *whole]}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


AnyMetric = Annotated[
    MetricUse,
    PlainValidator(_metric),
    PlainSerializer(lambda use: use.dump()),
    WithJsonSchema(_metric_schema()),
]


def _data_of_fit(mapping: Any) -> Any:
    if isinstance(mapping, Fit) and mapping.data is not None:
        try:
            DataSpec(**mapping.data)
        except SpecError as error:
            said = (f"fit.data{f'.{one.field}' * bool(one.field)}: {one.message}" for one in error.problems)
            raise ValueError("; ".join(said)) from None
    return mapping


class Recipe(Spec):
    """A Patchscope, its data, metrics and controls: what `patchscope run` runs.

    Attributes:
        name: Its short name, in lower-case letters, digits and hyphens.
        title: What it asks, in a line.
        paper: The paper and section it follows.
        model: M and M*, where `source.model` and `target.model` name no other: a Hugging Face id, a folder,
            or `builtin:...`.
        data: Where the rows come from that fill `{column}` placeholders; without it there is one row.
        source: Where the hidden state is taken.
        target: Where it is written.
        mapping: f: `identity`, `target_norm`, `aligned` (identity within one model, a fit between two),
            `{affine: file.safetensors}`, `{fitted: file.safetensors}`, `{fit: {kind: affine, data: ...}}` or
            `{function: module:name}`.
        readout: What is read from the patched run: `next_token`, `generate`, `choices` or `hidden`.
        metrics: One number each for every cell, from what was read and the data row.
        controls: What else is run to compare with: `unpatched` (T as it is), `random` (a random state of the
            same norm), `shuffled` (another row's state).
        seed: What random states, the choice of other rows and sampling start from.
    """

    name: Annotated[
        str, AfterValidator(_slug), WithJsonSchema({"type": "string", "pattern": f"^{_SLUG.pattern}$"})
    ]
    title: Annotated[str, Field(min_length=1)]
    paper: str | None = None
    model: Annotated[str, Field(min_length=1)] = "builtin:smollm2-135m-instruct"
    data: DataSpec | None = None
    source: Source
    target: Target = Target()
    mapping: Annotated[AnyMapping, AfterValidator(_data_of_fit)] = "identity"
    readout: AnyReadout = NextToken()
    # After the readout, which they are checked against.
    metrics: Annotated[tuple[AnyMetric, ...], BeforeValidator(_listed), AfterValidator(_once)] = ()
    controls: Annotated[tuple[Control, ...], BeforeValidator(_listed), AfterValidator(_once)] = ()
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def scope(self) -> Patchscope:
        """The Patchscope alone."""
        return Patchscope(source=self.source, target=self.target, mapping=self.mapping, readout=self.readout)


def dump(recipe: Recipe) -> dict[str, Any]:
    """A recipe as its YAML holds it, defaults left out; `Recipe(**dump(recipe)) == recipe`."""
    plain = recipe.model_dump(mode="json", exclude_defaults=True)
    if "readout" in plain:
        fields = recipe.readout.model_dump(mode="json", exclude_defaults=True)
        plain["readout"] = {recipe.readout.name: fields} if fields else recipe.readout.name
    return plain


def resolved(recipe: Recipe) -> dict[str, Any]:
    """A recipe with every default written out; `Recipe(**resolved(recipe)) == recipe`."""
    return recipe.model_dump(mode="json")
