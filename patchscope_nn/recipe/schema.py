"""The JSON Schema of recipes, for editors: names, types, defaults and the documentation of every field."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from patchscope_nn.metrics import METRICS
from patchscope_nn.recipe.model import Recipe
from patchscope_nn.spec import readout_kinds
from patchscope_nn.spec.mapping import MAPPINGS

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Generate the JSON Schema (draft 2020-12) of recipe files.

    It describes the form of every field. Rules that involve two fields (a metric that does not fit the
    readout), the data or the model are checked by `lint` and `plan`. It accepts the metrics and mappings that
    are registered or that installed packages provide; generate it again after installing such a package.

    Returns:
        The schema, as stored in recipes/recipe.schema.json.
    """
    schema = Recipe.model_json_schema(mode="validation")
    for kind in readout_kinds().values():
        form = kind.model_json_schema(mode="validation")
        schema["$defs"] |= {**form.pop("$defs", {}), kind.__name__: form}
    schema["$defs"] = dict(sorted(schema["$defs"].items()))
    source, target = schema["$defs"]["Source"], schema["$defs"]["Target"]
    source["properties"]["vector"] = _or_its_file(source["properties"]["vector"])
    source["oneOf"] = [_given(name) for name in ("prompt", "vector")]
    target["not"] = {"allOf": [_given("prompt"), _given("prompts", {"minItems": 1})]}
    _describe_data(schema["properties"]["mapping"])
    _list_names(schema)
    for name in ("columns", "metrics", "controls", "best_over"):
        schema["properties"][name]["uniqueItems"] = True
    schema["properties"]["readout"] |= {
        "default": Recipe.model_fields["readout"].default.name,
        "anyOf": _readouts(),
    }
    # The default of `target` is an object, whose fields have their own defaults; that of `title` is the name.
    for name in ("target", "title"):
        del schema["properties"][name]["default"]
    whole = {"$schema": _DIALECT, **schema, "title": "Patchscopes recipe"}
    return dict(json.loads(json.dumps(whole), object_hook=_one_line))


def _one_line(form: dict[str, Any]) -> dict[str, Any]:
    """Join the lines of a description, which editors would show as paragraphs."""
    text = form.get("description")
    return form | {"description": " ".join(text.split())} if isinstance(text, str) else form


def _describe_data(mapping: dict[str, Any]) -> None:
    """The data of `{fit: ...}` and `{train: ...}` has the form of a recipe's data."""
    for word in ("fit", "train"):
        form = next(form for form in mapping["anyOf"] if word in form.get("properties", {}))
        data = form["properties"][word]["anyOf"][1]["properties"]["data"]
        data["anyOf"] = [{"$ref": "#/$defs/DataSpec"}, {"type": "null"}]


def _list_names(schema: dict[str, Any]) -> None:
    """Add the names of all metrics and mappings: builtin, registered, and those of installed packages."""
    fields = schema["properties"]
    fields["metrics"]["items"] = _metrics()
    fields["columns"]["items"] = {"anyOf": [{"type": "string"}, _function()]}
    fields["mapping"]["anyOf"][0] = {"enum": MAPPINGS.names()}


def _metrics() -> dict[str, Any]:
    """The forms of a metric: its name if it has no parameters, `{name: parameters}`, or a function."""
    known = METRICS.entries
    bare = [name for name, metric in known.items() if not metric.parameters]
    elsewhere = [name for name in METRICS.names() if name not in known]
    forms = [_metric(name, metric.parameters, metric.title) for name, metric in known.items()]
    # The parameters of a package's metric are unknown until the package is imported.
    forms += [{"type": "object", "required": [name], "maxProperties": 1} for name in elsewhere]
    return {"anyOf": [{"enum": [*bare, *elsewhere]}, *forms, _function(more={"type": ["string", "integer"]})]}


def _metric(name: str, parameters: tuple[str, ...], title: str) -> dict[str, Any]:
    columns = {parameter: {"type": "string"} for parameter in parameters}
    return {"title": title, **_closed({name: _closed(columns)})}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _function(*, more: Any = False) -> dict[str, Any]:
    """The form `{function: module:name}`, with `more` as the form of additional keys."""
    reference = {"type": "string", "pattern": r"^[^:\s]+:[^:\s]+$"}
    return {"title": "function", **_closed({"function": reference}), "additionalProperties": more}


def _readouts() -> list[dict[str, Any]]:
    """The forms of a readout: its name if it has no required fields, or `{name: fields}`."""
    bare = [name for name, model in readout_kinds().items() if not _required(model)]
    forms: list[dict[str, Any]] = [{"enum": bare}]
    for name, model in readout_kinds().items():
        fields: dict[str, Any] = {"$ref": f"#/$defs/{model.__name__}"}
        if name in bare:  # `generate:` without a value
            fields = {"anyOf": [fields, {"type": "null"}]}
        forms.append(
            {
                "type": "object",
                "properties": {name: fields},
                "required": [name],
                "additionalProperties": False,
                "title": name,
            }
        )
    return forms


def _required(model: type[BaseModel]) -> bool:
    return any(field.is_required() for field in model.model_fields.values())


def _given(name: str, form: dict[str, Any] | None = None) -> dict[str, Any]:
    """The form of an object in which a field is present and not null."""
    return {"required": [name], "properties": {name: form or {"not": {"type": "null"}}}}


def _or_its_file(vector: dict[str, Any]) -> dict[str, Any]:
    """Allow a vector's file in place of the vector."""
    return vector | {"anyOf": [{"type": "string", "minLength": 1}, *vector["anyOf"]]}
