"""`patchscope fit` of the trained kinds: each command is made from what the kind says of itself."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from patchscope_nn.cli import fit_printing, groups, options, printing
from patchscope_nn.cli.fitting import parse_data
from patchscope_nn.cli.options import option
from patchscope_nn.fitting import fit_trained
from patchscope_nn.fitting.trained.kind import HELD_OUT, SEED, TrainedKind
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.spec import Source, Target

Data: TypeAlias = Annotated[
    str, option("--data", help="builtin:NAME, hub:ORG/NAME:SPLIT, or a file of rows.")
]
Column: TypeAlias = Annotated[
    str | None, option("--column", help="The texts' column; needed where the data has several.")
]
File: TypeAlias = Annotated[Path, option("--out", help="The safetensors file that is written.")]
_REQUIRED = inspect.Parameter.empty

#: The options of a `Training`; their defaults are the kind's.
_TRAINING: dict[str, Any] = {
    "steps": Annotated[int, option("--steps", help="Steps of the optimiser.")],
    "batch": Annotated[int, option("--batch", help="What a step sees: tokens, or rows.")],
    "learning_rate": Annotated[float, option("--learning-rate", help="Adam's rate at first.")],
    "held_out": Annotated[float, option("--held-out", help=HELD_OUT.help)],
    "stopping": Annotated[
        float, option("--stopping", help="The share that chooses the best step; 0 keeps the last.")
    ],
    "seed": Annotated[int, option("--seed", help=SEED.help, min=SEED.least)],
}
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
    signature = _signature(kind)

    def command(**values: Any) -> None:
        _fit(kind, **values)

    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
    command.__doc__ = kind.summary
    return command


def _signature(kind: TrainedKind) -> list[inspect.Parameter]:
    """The options of a kind's command, as parameters that Typer reads."""
    offered: dict[str, tuple[Any, Any]] = {"data": (Data, kind.data or _REQUIRED)}
    if kind.reads == "texts":
        offered["column"] = (Column, None)
    offered |= {"limit": (options.Limit, None), "out": (File, _REQUIRED)}
    for name, parameter in kind.parameters().items():
        if name == "training":
            defaults = (kind.training or Training()).model_dump()
            offered |= {field: (_TRAINING[field], defaults[field]) for field in _TRAINING}
        elif name in ("source", "target"):
            offered |= _SOURCE if name == "source" else _TARGET
        else:
            offered[_cli_name(name)] = _option(kind, name, parameter)
    offered["model"] = (options.Model, None)
    if kind.two_models:
        offered |= {"source_model": (options.SourceModel, None), "target_model": (options.TargetModel, None)}
    offered |= {
        "dtype": (options.Dtype, "auto"),
        "device_map": (options.DeviceMap, None),
        "json": (options.Json, False),
        "log_level": (options.Level, "warning"),
    }
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in offered.items()
    ]


def _cli_name(name: str) -> str:
    """The name of an option; `--layer` names one layer or several."""
    return "layer" if name == "layers" else name


def _option(kind: TrainedKind, name: str, parameter: inspect.Parameter) -> tuple[Any, Any]:
    """The annotation and the default of one of a kind's own options."""
    own = kind.options[name]
    flag = "--" + _cli_name(name).replace("_", "-")
    limits = {} if own.least is None else {"min": own.least}
    annotation, default = parameter.annotation, parameter.default
    if own.selector:
        annotation = str
        default = default if default is _REQUIRED or isinstance(default, str) else str(list(default))
    return Annotated[annotation, option(flag, help=own.help, **limits)], default


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
    for name, parameter in kind.parameters().items():
        if name == "training":
            arguments[name] = Training(**{field: values[field] for field in _TRAINING})
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
        elif kind.options[name].selector:
            value = selector(_cli_name(name))
            several = isinstance(parameter.default, tuple)
            arguments[name] = [value] if several and not isinstance(value, list) else value
        else:
            arguments[name] = values[name]
    return arguments


def _load(name: str | None, values: dict[str, Any]) -> Any:
    return groups.OneModel(model=name, dtype=values["dtype"], device_map=values["device_map"]).load()
