"""`patchscope fit` of the trained kinds: each command is made from what the kind says of itself."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias, get_args

from patchscope_nn.cli import fit_printing, groups, options, printing
from patchscope_nn.cli.fitting import parse_data
from patchscope_nn.cli.options import option
from patchscope_nn.fitting import fit_trained
from patchscope_nn.fitting.trained.kind import TrainedKind
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.spec import Source, Target

Data: TypeAlias = Annotated[
    str, option("--data", help="builtin:NAME, hub:ORG/NAME:SPLIT, or a file of rows.")
]
Column: TypeAlias = Annotated[
    str | None, option("--column", help="The texts' column; needed where the data has several.")
]
_REQUIRED = inspect.Parameter.empty

#: The options of a `Source` and a `Target`, with their defaults.
_SOURCE: dict[str, tuple[Any, Any]] = {
    "source_prompt": (Annotated[str, option("--source-prompt", help="S; {column} is filled.")], _REQUIRED),
    "position": (options.Position, "-1"),
    "layer": (options.Layer, "all"),
}
_TARGET: dict[str, tuple[Any, Any]] = {
    "target_prompt": (
        Annotated[str, option("--target-prompt", help="T, with a placeholder token.")],
        _REQUIRED,
    ),
    "target_position": (
        Annotated[str, option("--target-position", help="The placeholder: an index or a text of T.")],
        "-1",
    ),
    "target_layer": (options.TargetLayer, "same"),
}


def command_of(kind: TrainedKind) -> Callable[..., None]:
    """The command of a kind: its signature is what Typer makes the options from."""

    def command(**values: Any) -> None:
        _fit(kind, **values)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _offered(kind).items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = kind.summary
    return command


def _offered(kind: TrainedKind) -> dict[str, tuple[Any, Any]]:
    """The annotation and the default of each option of a kind's command."""
    offered: dict[str, tuple[Any, Any]] = {"data": (Data, kind.data or _REQUIRED)}
    if kind.reads == "texts":
        offered["column"] = (Column, None)
    offered |= {"limit": (options.Limit, None), "out": (options.FitFile, _REQUIRED)}
    for name, parameter in kind.parameters.items():
        if name == "training":
            offered |= _training(kind.training or Training())
        elif name in ("source", "target"):
            offered |= _SOURCE if name == "source" else _TARGET
        else:
            offered[_cli_name(name)] = _own(name, parameter)
    offered["model"] = (options.Model, None)
    if kind.two_models:
        offered |= {"source_model": (options.SourceModel, None), "target_model": (options.TargetModel, None)}
    return offered | {
        "dtype": (options.Dtype, "auto"),
        "device_map": (options.DeviceMap, None),
        "json": (options.Json, False),
        "log_level": (options.Level, "warning"),
    }


def _training(defaults: Training) -> dict[str, tuple[Any, Any]]:
    """The options of a `Training`; its other limits are checked when it is made."""
    return {
        name: (_annotated(field.annotation, name, field.description, 0 if name == "seed" else None), default)
        for (name, field), default in zip(
            Training.model_fields.items(), defaults.model_dump().values(), strict=True
        )
    }


def _own(name: str, parameter: inspect.Parameter) -> tuple[Any, Any]:
    """One of a kind's own options."""
    kind, described = get_args(parameter.annotation)
    default = parameter.default
    if described.selector:
        kind = str
        default = default if default is _REQUIRED or isinstance(default, str) else str(list(default))
    return _annotated(kind, _cli_name(name), described.help, described.least), default


def _annotated(kind: Any, name: str, text: str | None, least: int | None) -> Any:
    """The annotation of an option for Typer."""
    limits = {} if least is None else {"min": least}
    return Annotated[kind, option("--" + name.replace("_", "-"), help=text or "", **limits)]


def _cli_name(name: str) -> str:
    """The name of an option; `--layer` names one layer or several."""
    return "layer" if name == "layers" else name


def _fit(kind: TrainedKind, **values: Any) -> None:
    shared: dict[str, Any] = {name: values[name] for name in ("column", "limit") if name in values}
    model = values.get("source_model") or values["model"]
    if values.get("target_model") is not None:
        shared["target_model"] = _load(values["target_model"], values)
    progress = printing.Progress(f"fitting {kind.name}", quiet=values["json"], unit=kind.unit)
    fitted = fit_trained(
        kind.name,
        model=_load(model, values),
        data=parse_data(values["data"]),
        command=shlex.join(["patchscope", *sys.argv[1:]]),
        progress=progress,
        **shared,
        **_arguments(kind, values),
    )
    fit_printing.print_fit(fitted.said(), fitted.save(values["out"]), as_json=values["json"])


def _arguments(kind: TrainedKind, values: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the kind's fit."""

    def selector(name: str) -> Any:
        return options.parse_selector(values[name], option="--" + name.replace("_", "-"))

    arguments: dict[str, Any] = {}
    for name, parameter in kind.parameters.items():
        if name == "training":
            arguments[name] = Training(**{field: values[field] for field in Training.model_fields})
        elif name == "source":
            arguments[name] = Source(
                prompt=values["source_prompt"], position=selector("position"), layer=selector("layer")
            )
        elif name == "target":
            arguments[name] = Target(
                prompt=values["target_prompt"],
                position=selector("target_position"),
                layer=selector("target_layer"),
            )
        elif get_args(parameter.annotation)[1].selector:
            value = selector(_cli_name(name))
            several = isinstance(parameter.default, tuple)
            arguments[name] = [value] if several and not isinstance(value, list) else value
        else:
            arguments[name] = values[name]
    return arguments


def _load(name: str | None, values: dict[str, Any]) -> Any:
    return groups.OneModel(model=name, dtype=values["dtype"], device_map=values["device_map"]).load()
