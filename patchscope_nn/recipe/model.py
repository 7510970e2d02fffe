"""The recipe as data: a Patchscope with its data, metrics and controls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from patchscope_nn.data.rows import DataSpec
from patchscope_nn.errors import SpecError, did_you_mean
from patchscope_nn.metrics import ColumnUse, MetricUse, check_metrics, parse_column, parse_metric
from patchscope_nn.readouts import NextToken
from patchscope_nn.recipe.methods import variants
from patchscope_nn.spec import (
    AnyMapping,
    AnyReadout,
    Control,
    Fit,
    Patchscope,
    Source,
    Spec,
    Target,
    Train,
    dump_readout,
)

_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


def _slug(name: str) -> str:
    if not _SLUG.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a valid recipe name; use lower-case letters and digits, with single hyphens "
            "between words: my-recipe"
        )
    return name


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [value.name if isinstance(value, MetricUse | ColumnUse) else value for value in values]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"names {twice[0]} twice; each makes one column or kind of cell, so name it once")
    return values


def _metric(value: Any, info: ValidationInfo) -> MetricUse:
    use = parse_metric(value)
    # The readout is checked before the metrics; it is missing here if it is invalid.
    messages = check_metrics([use], info.data["readout"]) if "readout" in info.data else []
    if messages:
        raise ValueError(messages[0])
    return use


AnyMetric = Annotated[
    MetricUse,
    PlainValidator(_metric),
    PlainSerializer(lambda use: use.dump()),
    WithJsonSchema({}),  # `schema.py` adds the metrics that are known when the schema is generated
]
AnyColumn = Annotated[
    ColumnUse, PlainValidator(parse_column), PlainSerializer(lambda use: use.dump()), WithJsonSchema({})
]


class Probe(Spec):
    """A linear probe on the states of a run whose readout is `hidden` (the baseline of section 4.2).

    It adds the columns `probe_choice`, `probe_accuracy`, `probe_majority_accuracy` (of always predicting the
    most common class) and `probe_shuffled_accuracy` (of a probe trained on shuffled labels).
    """

    label: Annotated[str, Field(min_length=1)]
    """The data column of the class."""
    folds: Annotated[int, Field(ge=2)] = 3
    """The number of folds; each cell is predicted by a probe that was trained without its source prompt."""


#: The metric columns that a probe adds, after `probe_choice`.
PROBE_METRICS = ("probe_accuracy", "probe_majority_accuracy", "probe_shuffled_accuracy")


def _probe(probe: Probe | None, info: ValidationInfo) -> Probe | None:
    """Check that a probe is trained on h itself: T = S, i* = i, l* = l and f the identity."""
    fields = info.data
    if probe is None or not {"readout", "source", "target", "mapping"} <= set(fields):
        return probe
    if "hidden" not in fields["readout"].columns:
        raise ValueError(
            f"reads hidden states, and the readout is {fields['readout'].name}; write readout: hidden"
        )
    target = fields["target"]
    extra = [
        f"target.{name}" for name in ("prompt", "position", "model") if getattr(target, name) is not None
    ]
    extra += ["target.layer"] if target.layer != "same" else []
    extra += ["target.site"] if target.site != fields["source"].site else []
    if extra or fields["mapping"] != "identity":
        raise ValueError(f"is trained on the source's own states; leave out {', '.join(extra) or 'mapping'}")
    return probe


def _score(score: str | None, info: ValidationInfo) -> str | None:
    names = [use.name for use in info.data.get("metrics", ())]
    names += PROBE_METRICS if info.data.get("probe") else ()
    if score is not None and "metrics" in info.data and score not in names:
        raise ValueError(f"{score!r} is not a metric of this recipe. {did_you_mean(score, names)}")
    return score


def _methods_schema() -> dict[str, Any]:
    changes = {"anyOf": [{"type": "object"}, {"type": "null"}]}
    single = {"minProperties": 1, "maxProperties": 1}
    return {"type": "object", "additionalProperties": changes, "not": single}


def _plain_methods(value: Any) -> Any:
    return {name: changes or {} for name, changes in value.items()} if isinstance(value, Mapping) else value


def _data_of_fit(mapping: Any) -> Any:
    if isinstance(mapping, Fit | Train) and mapping.data is not None:
        word = "fit" if isinstance(mapping, Fit) else "train"
        try:
            DataSpec(**mapping.data)
        except SpecError as error:
            messages = (
                f"{word}.data{f'.{problem.field}' * bool(problem.field)}: {problem.message}"
                for problem in error.problems
            )
            raise ValueError("; ".join(messages)) from None
    return mapping


class Recipe(Spec):
    """A Patchscope with its data, metrics and controls: what `patchscope run` runs."""

    name: Annotated[
        str, AfterValidator(_slug), WithJsonSchema({"type": "string", "pattern": f"^{_SLUG.pattern}$"})
    ]
    """A short name, in lower-case letters, digits and hyphens."""
    title: Annotated[str, Field(min_length=1)] = ""
    """The question it answers, in one line; by default its name."""
    paper: str | None = None
    """The paper and section it follows."""
    model: Annotated[str, Field(min_length=1)] = "builtin:smollm2-135m-instruct"
    """M and M*, unless `source.model` or `target.model` name another: a Hugging Face id, a folder, or
    `builtin:...`."""
    data: DataSpec | None = None
    """The source of the rows that fill `{column}` placeholders; without it there is one row."""
    source: Source
    """Where the hidden state is read."""
    target: Target = Target()
    """Where the mapped state is written."""
    mapping: Annotated[AnyMapping, AfterValidator(_data_of_fit)] = "identity"
    """f: `identity`, `target_norm`, `aligned` (identity within one model, a fit between two), `{affine:
    file.safetensors}`, `{fitted: file.safetensors}`, `{fit: {kind: affine, data: ...}}`, `{train: {kind:
    tuned_lens, ...}}`, a published lens (`{tuned_lens: folder}` or `{jacobian_lens: file.pt}`), or
    `{function: module:name}`."""
    readout: AnyReadout = NextToken()
    """What is read from the patched run: `next_token`, `generate`, `choices` or `hidden`."""
    columns: Annotated[tuple[AnyColumn, ...], BeforeValidator(_listed), AfterValidator(_once)] = ()
    """Columns that are derived from the readout, before the metrics: a name, or `{function: module:name}`."""
    # After the readout, which they are checked against.
    metrics: Annotated[tuple[AnyMetric, ...], BeforeValidator(_listed), AfterValidator(_once)] = ()
    """Metrics, each of which computes a number for every cell from the readout and the data row."""
    controls: Annotated[tuple[Control, ...], BeforeValidator(_listed), AfterValidator(_once)] = ()
    """Runs to compare with: `unpatched` (T without a patch), `random` (a random state of the same norm),
    `shuffled` (another row's state), `text-only` (the source's text in place of the state)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of random states, of the choice of other rows, and of sampling."""
    best_over: Annotated[
        tuple[Literal["source_layer", "target_layer"], ...], BeforeValidator(_listed), AfterValidator(_once)
    ] = ()
    """The dimensions over which the summary and the figures take the best value, for the controls too:
    `source_layer`, `target_layer` or both."""
    probe: Annotated[Probe | None, AfterValidator(_probe)] = None
    """A linear probe on the states; only with the readout `hidden` and without a target."""
    # After the metrics and the probe.
    score: Annotated[str | None, AfterValidator(_score)] = None
    """The metric by which this recipe is compared with recipes that have other metrics."""
    methods: Annotated[
        dict[str, dict[str, Any]], BeforeValidator(_plain_methods), WithJsonSchema(_methods_schema())
    ] = Field(default_factory=dict)
    """Methods to compare, by name, each with its changes to this recipe, nested or dotted: `{token identity:
    {}, logit lens: {target: {prompt: null, layer: -1}}}`. Each has its own run."""

    @model_validator(mode="before")
    @classmethod
    def _titled(cls, raw: Any) -> Any:
        named = isinstance(raw, Mapping) and isinstance(raw.get("name"), str)
        return {"title": raw["name"], **raw} if named else raw

    @model_validator(mode="after")
    def _methods_fit(self) -> Self:
        if self.methods:
            _, wrong = variants(type(self), _raw(self), self.methods)
            if wrong:
                raise ValueError("; ".join(map(str, wrong)))
        return self

    def of_methods(self) -> dict[str, Recipe]:
        """Return the recipe of each method, by its name; empty without methods."""
        return variants(type(self), _raw(self), self.methods)[0] if self.methods else {}

    @property
    def scope(self) -> Patchscope:
        """The Patchscope of the recipe."""
        return Patchscope(source=self.source, target=self.target, mapping=self.mapping, readout=self.readout)


def dump(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to its YAML form, without defaults; `Recipe(**dump(recipe)) == recipe`."""
    plain = recipe.model_dump(mode="json", exclude_defaults=True)
    if "readout" in plain:
        ((name, fields),) = dump_readout(recipe.readout, exclude_defaults=True).items()
        plain["readout"] = {name: fields} if fields else name
    return plain


def _raw(recipe: Recipe) -> dict[str, Any]:
    """Return the raw recipe that methods change: without `methods`, and with Python functions as objects."""
    plain = dump(recipe)
    plain.pop("methods", None)
    plain |= {name: list(getattr(recipe, name)) for name in ("columns", "metrics") if name in plain}
    return plain | ({"mapping": recipe.mapping} if callable(recipe.mapping) else {})


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to its YAML form, with every default; `Recipe(**resolved(recipe)) == recipe`."""
    return recipe.model_dump(mode="json")
