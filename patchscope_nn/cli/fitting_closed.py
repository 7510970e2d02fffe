"""`patchscope fit` of the closed forms: affine, orthogonal, low_rank and scale."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import typer

from patchscope_nn.cli import fit_printing, groups, options, printing
from patchscope_nn.cli.fitting import fit, parse_data


@groups.grouped
def _closed(
    context: typer.Context,
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
    models: groups.Models,
    json: options.Json = False,
    log_level: options.Level = "warning",  # noqa: ARG001 (acted on by its callback)
) -> None:
    kind = str(context.info_name)
    with printing.waiting("loading the model", quiet=json):
        from patchscope_nn.fitting import fit_mapping
        from patchscope_nn.runs.loading import load_models

        source, target = load_models(places=models.places(), **models.names)
    progress = printing.Progress(f"fitting {kind}", quiet=json, unit="texts")
    fitted = fit_mapping(
        kind,  # type: ignore[arg-type]  # Typer runs it only for these kinds
        model=source,
        target_model=target,
        pairs=pairs,
        source_layers=options.parse_selector(source_layers, option="--source-layers"),
        target_layers=options.parse_selector(target_layers, option="--target-layers"),
        data=None if data is None else parse_data(data),
        held_out=_share_or_data(held_out),
        column=column,
        limit=limit,
        positions=positions or None,
        max_tokens=max_tokens,
        rank=rank,
        seed=seed,
        **models.where,
        out=out,
        command=shlex.join(["patchscope", *sys.argv[1:]]),
        progress=progress,
        notice=printing.caution,
    )
    fit_printing.print_closed_fit(fitted, file=out, as_json=json)


def _share_or_data(text: str) -> float | dict[str, Any]:
    try:
        return float(text)
    except ValueError:
        return parse_data(text)


for _kind, _formula in {
    "affine": "f(h) = W h + b by ridge regression between layers of two models, or of one",
    "orthogonal": "f(h) = Q h + b, the rotation that brings states closest (Procrustes)",
    "low_rank": "f(h) = U V h + b, ridge regression of a given rank",
    "scale": "f(h) = a h, one number, chosen on held-out texts",
}.items():
    fit.command(name=_kind, help=f"{_formula}.")(_closed)

__all__ = ["fit"]
