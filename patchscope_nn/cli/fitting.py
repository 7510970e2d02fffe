"""`patchscope fit KIND`: fit a mapping or a prompt, score it on what was held out, and save it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from patchscope_nn.cli import fit_printing, groups, options, printing
from patchscope_nn.cli.options import LogLevel, option
from patchscope_nn.errors import InputError

fit = typer.Typer(
    help="Fit a mapping or a prompt, score it on what was held out, and save it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Data: TypeAlias = Annotated[
    str, option("--data", help="builtin:NAME, hub:ORG/NAME:SPLIT, or a file of rows.")
]
Column: TypeAlias = Annotated[
    str | None, option("--column", help="The texts' column; needed where the data has several.")
]
File: TypeAlias = Annotated[Path, option("--out", help="The safetensors file that is written.")]
MaxTokens: TypeAlias = Annotated[
    int, option("--max-tokens", help="How many tokens of a text are read.", min=2)
]
SkipFirst: TypeAlias = Annotated[
    int, option("--skip-first", help="How many tokens at a text's beginning are left out.", min=0)
]
Steps: TypeAlias = Annotated[int, option("--steps", help="Steps of the optimiser.")]
Batch: TypeAlias = Annotated[int, option("--batch", help="What a step sees: tokens, or rows.")]
Rate: TypeAlias = Annotated[
    float | None, option("--learning-rate", help="Adam's rate at first; the kind's own unless given.")
]
HeldOut: TypeAlias = Annotated[
    float, option("--held-out", help="The share of the data that it is scored on, and nothing else.")
]
Stopping: TypeAlias = Annotated[
    float, option("--stopping", help="The share that chooses the best step; 0 keeps the last.")
]
Seed: TypeAlias = Annotated[
    int, option("--seed", help="Decides what is held out, the order of the data, random starts.", min=0)
]
AtATime: TypeAlias = Annotated[
    int, option("--rows-at-a-time", help="Rows of a Jacobian that a backward pass gives.", min=1)
]


@dataclass(frozen=True, kw_only=True)
class _Training:
    """How something is trained, besides what a step sees."""

    steps: Steps = 300
    learning_rate: Rate = None
    held_out: HeldOut = 0.2
    stopping: Stopping = 0.1
    seed: Seed = 0

    def options(self, *, batch: int, rate: float) -> Any:
        """The options as `fit_trained` takes them; `rate` is the kind's own learning rate."""
        from patchscope_nn.fitting.trained.training import Training

        chosen = rate if self.learning_rate is None else self.learning_rate
        return Training(**{**asdict(self), "learning_rate": chosen}, batch=batch)


@fit.command(name="tuned_lens")
@groups.grouped
def tuned_lens(
    *,
    data: Data = "builtin:contexts",
    column: Column = None,
    limit: options.Limit = None,
    layer: options.Layer = "all",
    out: File,
    max_tokens: MaxTokens = 128,
    skip_first: SkipFirst = 1,
    batch: Batch = 64,
    training: _Training,
    model: groups.OneModel,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Translators from layers to the last block, trained to say what the model says (arXiv 2303.08112)."""
    _fit(
        "tuned_lens",
        data=data,
        column=column,
        limit=limit,
        out=out,
        model=model.load(),
        json=json,
        layers=options.parse_selector(layer, option="--layer"),
        max_tokens=max_tokens,
        skip_first=skip_first,
        training=training.options(batch=batch, rate=1e-3),
    )


@fit.command(name="jacobian_lens")
@groups.grouped
def jacobian_lens(
    *,
    data: Data,
    column: Column = None,
    limit: options.Limit = None,
    layer: options.Layer = "all",
    out: File,
    max_tokens: MaxTokens = 128,
    skip_first: SkipFirst = 16,
    rows_at_a_time: AtATime = 16,
    held_out: HeldOut = 0.2,
    seed: Seed = 0,
    model: groups.OneModel,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """The mean Jacobian of the last block's states by a layer's, over texts (Gurnee et al. 2026)."""
    _fit(
        "jacobian_lens",
        data=data,
        column=column,
        limit=limit,
        out=out,
        model=model.load(),
        json=json,
        layers=options.parse_selector(layer, option="--layer"),
        max_tokens=max_tokens,
        skip_first=skip_first,
        rows_at_a_time=rows_at_a_time,
        held_out=held_out,
        seed=seed,
    )


@fit.command(name="lre")
@groups.grouped
def lre(
    *,
    data: Data,
    prompt: Annotated[str, option("--prompt", help="States the relation: 'The capital of {country} is'.")],
    subject: Annotated[str, option("--subject", help="The subject's column.")],
    limit: options.Limit = None,
    layer: options.Layer = "all",
    out: File,
    subjects: Annotated[int, option("--subjects", help="How many it is fitted on.", min=1)] = 8,
    beta: Annotated[float | None, option("--beta", help="The slope's factor; chosen unless given.")] = None,
    rank: Annotated[
        int | None, option("--rank", help="How many directions of the slope are kept.", min=1)
    ] = None,
    rows_at_a_time: AtATime = 64,
    seed: Seed = 0,
    model: groups.OneModel,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """A relation as one affine map, from a subject's state to the last block (arXiv 2308.09124)."""
    _fit(
        "lre",
        data=data,
        limit=limit,
        out=out,
        model=model.load(),
        json=json,
        layers=options.parse_selector(layer, option="--layer"),
        prompt=prompt,
        subject=subject,
        subjects=subjects,
        beta=beta,
        rank=rank,
        rows_at_a_time=rows_at_a_time,
        seed=seed,
    )


@groups.grouped
def _through_text(
    context: typer.Context,
    *,
    data: Data,
    source_prompt: Annotated[str, option("--source-prompt", help="S; {column} is filled.")],
    position: options.Position = "-1",
    layer: options.Layer = "all",
    target_prompt: Annotated[str, option("--target-prompt", help="T, with a placeholder token.")],
    target_position: Annotated[
        str, option("--target-position", help="The placeholder: an index or a text of T.")
    ] = "-1",
    target_layer: options.TargetLayer = "same",
    text: Annotated[str, option("--text", help="What should follow T: ' {description}'.")],
    rank: Annotated[
        int | None, option("--rank", help="The rank of U V, for trained_low_rank; 8 unless given.", min=1)
    ] = None,
    limit: options.Limit = None,
    out: File,
    batch: Batch = 16,
    training: _Training,
    model: groups.OneModel,
    source_model: options.SourceModel = None,
    target_model: options.TargetModel = None,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    from patchscope_nn.fitting.trained.through_text import KINDS
    from patchscope_nn.spec import Source, Target

    kind = str(context.info_name)
    place = options.parse_selector(position, option="--position")
    star = options.parse_selector(target_position, option="--target-position")
    _fit(
        kind,
        data=data,
        limit=limit,
        out=out,
        model=replace(model, model=source_model or model.model).load(),
        target_model=None if target_model is None else replace(model, model=target_model).load(),
        json=json,
        source=Source(
            prompt=source_prompt,
            position=place,
            layer=options.parse_selector(layer, option="--layer"),
        ),
        target=Target(
            prompt=target_prompt,
            position=star,
            layer=options.parse_selector(target_layer, option="--target-layer"),
        ),
        text=text,
        rank=rank,
        training=training.options(batch=batch, rate=KINDS[kind][1]),
    )


for _kind, _formula in {
    "trained_scale": "a h",
    "trained_scalar_affine": "a h + b",
    "trained_low_rank": "h + U V h + b",
    "trained_affine": "W h + b",
}.items():
    fit.command(
        name=_kind,
        help=f"f(h) = {_formula}, trained so that a text follows T with f(h) in it (arXiv 2602.10352).",
    )(_through_text)


@fit.command(name="soft_prompt")
@groups.grouped
def soft_prompt(
    *,
    data: Data = "builtin:contexts",
    column: Column = None,
    limit: options.Limit = None,
    layer: Annotated[str, option("--layer", help="l, and l*: one layer.")],
    out: File,
    tokens: Annotated[int, option("--tokens", help="k, the prompt's length.", min=1)] = 10,
    offsets: Annotated[
        str, option("--offsets", help="The tokens to foretell: 0 is the next, [0, 1] the next two.")
    ] = "[0, 1]",
    max_tokens: MaxTokens = 128,
    skip_first: SkipFirst = 1,
    batch: Batch = 16,
    training: _Training,
    model: groups.OneModel,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """A target prompt of learned embeddings, which says what a state foretells (arXiv 2311.04897)."""
    wanted = options.parse_selector(offsets, option="--offsets")
    _fit(
        "soft_prompt",
        data=data,
        column=column,
        limit=limit,
        out=out,
        model=model.load(),
        json=json,
        layer=options.parse_selector(layer, option="--layer"),
        tokens=tokens,
        offsets=wanted if isinstance(wanted, list) else [wanted],
        max_tokens=max_tokens,
        skip_first=skip_first,
        training=training.options(batch=batch, rate=0.01),
    )


def _fit(kind: str, *, data: str, out: Path, json: bool, **given: Any) -> None:
    from patchscope_nn.fitting.trained.fit import fit_trained

    progress = printing.Progress(f"fitting {kind}", quiet=json, unit="steps")
    command = shlex.join(["patchscope", *sys.argv[1:]])
    found = fit_trained(kind, data=parse_data(data), command=command, progress=progress, **given)
    fit_printing.print_fit(found.said(), found.save(out), as_json=json)


def parse_data(text: str) -> dict[str, Any]:
    """The fields of a `DataSpec`, as `--data` gives them.

    Raises:
        InputError: A Hub data set without its split.
    """
    kind, _, rest = text.partition(":")
    if kind == "builtin":
        return {"builtin": rest}
    if kind != "hub":
        return {"file": text}
    name, _, split = rest.partition(":")
    if not split:
        raise InputError(f"--data={text!r} names no split.", hint=f"Write hub:{name or 'org/name'}:train.")
    return {"hub": name, "split": split}
