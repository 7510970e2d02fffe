"""The command that fits mappings."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from patchscope_nn.cli import options, printing
from patchscope_nn.cli.commands import app
from patchscope_nn.cli.options import LogLevel
from patchscope_nn.errors import InputError
from patchscope_nn.spec import FIT_KINDS


@app.command()
def fit(
    kind: Annotated[str, typer.Argument(help=f"What to fit: {', '.join(FIT_KINDS)}.")],
    *,
    out: options.FitFile,
    data: options.Texts = None,
    column: options.Column = None,
    held_out: options.HeldOut = "0.2",
    pairs: options.Pairs = "same",
    source_layers: options.SourceLayers = "all",
    target_layers: options.TargetLayers = "all",
    limit: options.TextLimit = None,
    positions: options.Positions = 32,
    max_tokens: options.MaxTokens = 256,
    rank: options.Rank = None,
    seed: options.Seed = 0,
    model: options.Model = None,
    source_model: options.SourceModel = None,
    target_model: options.TargetModel = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    remote: options.Remote = None,
    source_remote: options.SourceRemote = None,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Fit maps between the layers of two models, or of one, and measure them on texts held out."""
    if kind not in FIT_KINDS:
        from patchscope_nn.errors import did_you_mean

        raise InputError(f"{kind!r} is no kind of fit.", hint=did_you_mean(kind, FIT_KINDS))
    with printing.waiting("loading the model", quiet=json):
        from patchscope_nn.fit import fit_mapping
        from patchscope_nn.prepare import load_models

        source, target = load_models(
            model=model,
            source_model=source_model,
            target_model=target_model,
            dtype=dtype,
            device_map=device_map,
            remote=options.remote_value(remote),
            source_remote=options.source_remote_value(source_remote),
        )
    progress = printing.Progress(f"fitting {kind}", quiet=json, unit="texts")
    fitted = fit_mapping(
        kind,  # type: ignore[arg-type]  # checked above
        source_model=source,
        target_model=target,
        pairs=pairs,
        source_layers=options.parse_selector(source_layers, option="--source-layers"),
        target_layers=options.parse_selector(target_layers, option="--target-layers"),
        data=None if data is None else data_of(data),
        held_out=_share_or_data(held_out),
        column=column,
        limit=limit,
        positions=positions or None,
        max_tokens=max_tokens,
        rank=rank,
        seed=seed,
        remote=options.remote_value(remote),
        source_remote=options.source_remote_value(source_remote),
        out=out,
        command=shlex.join(["patchscope", *sys.argv[1:]]),
        progress=progress,
        notice=printing.caution,
    )
    printing.print_fit(fitted, file=out, as_json=json)


def data_of(text: str) -> dict[str, Any]:
    """Data as `--data` names it, as a recipe writes it."""
    kind, colon, name = text.partition(":")
    if colon and kind == "builtin":
        return {"builtin": name}
    if colon and kind == "hub":
        name, _, split = name.partition(":")
        return {"hub": name, "split": split or "train"}
    return {"file": text}


def _share_or_data(text: str) -> float | dict[str, Any]:
    try:
        return float(text)
    except ValueError:
        return data_of(text)
