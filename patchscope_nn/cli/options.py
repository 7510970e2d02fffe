"""The options that commands share. Every one can also be set by a `PATCHSCOPE_...` variable."""

from __future__ import annotations

import logging
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from patchscope_nn.errors import InputError


def option(*names: str, help: str, **more: Any) -> Any:  # noqa: A002 (typer's own name for it)
    """A typer option that a `PATCHSCOPE_` variable of its name can set too."""
    variable = "PATCHSCOPE_" + names[0].removeprefix("--").upper().replace("-", "_")
    return typer.Option(*names, help=help, envvar=variable, show_envvar=False, **more)


class LogLevel(StrEnum):
    """How much is logged to stderr."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def _set_log_level(level: LogLevel) -> LogLevel:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("patchscope_nn").setLevel(level.upper())
    return level


Recipe: TypeAlias = Annotated[
    str, typer.Argument(help="A recipe's name (see `patchscope recipes`) or file; - reads it from the input.")
]
Model: TypeAlias = Annotated[
    str | None, option("--model", help="Hugging Face id, folder or builtin:... ; both M and M*.")
]
SourceModel: TypeAlias = Annotated[str | None, option("--source-model", help="M, whose states are read.")]
TargetModel: TypeAlias = Annotated[str | None, option("--target-model", help="M*, which explains them.")]
Dtype: TypeAlias = Annotated[
    str, option("--dtype", help="float32, bfloat16, float16, or auto for the checkpoint's own.")
]
DeviceMap: TypeAlias = Annotated[
    str | None, option("--device-map", help="Passed to transformers: cpu, cuda, auto, ...")
]
Position: TypeAlias = Annotated[
    str, option("--position", help="Which token: an index (-1 is the last) or a text of the prompt.")
]
Layer: TypeAlias = Annotated[str, option("--layer", help="Which layers: all, 5, [0, 4, 8] or 0:10.")]
TargetLayer: TypeAlias = Annotated[str, option("--target-layer", help="Where to write: same, or as --layer.")]
MaxNewTokens: TypeAlias = Annotated[
    int, option("--max-new-tokens", help="The most tokens to generate.", min=1)
]
Remote: TypeAlias = Annotated[
    str | None,
    option(
        "--remote",
        help="Where M* runs: ndif (as nnsight is configured), a URL, or local, which rehearses it here.",
        metavar="ndif|URL|local",
    ),
]
SourceRemote: TypeAlias = Annotated[
    str | None,
    option("--source-remote", help="Where M runs, the same or `no`; unless given, where M* does."),
]
Jobs: TypeAlias = Annotated[
    int | None,
    option("--jobs", help="How many jobs may be on their way to a server at a time; 4 unless given.", min=1),
]
Out: TypeAlias = Annotated[
    Path | None, option("--out", help="The run's folder; runs/NAME-HASH unless given.")
]
Figures: TypeAlias = Annotated[
    Path | None,
    option("--figures", help="Write the figures for a paper here, too: PDF, SVG and PNG.", metavar="DIR"),
]
Sets: TypeAlias = Annotated[
    list[str] | None,
    option("--set", help="Change a field of the recipe: key.path=value. Repeatable.", metavar="KEY=VALUE"),
]
Limit: TypeAlias = Annotated[int | None, option("--limit", help="The most data rows.", min=1)]
Json: TypeAlias = Annotated[bool, option("--json", help="Print JSON instead of tables.")]
Level: TypeAlias = Annotated[
    LogLevel, option("--log-level", help="How much to log.", callback=_set_log_level)
]
Lenses: TypeAlias = Annotated[
    list[str] | None,
    option("--lens", help="One more next_token recipe to read the grid with. Repeatable.", metavar="RECIPE"),
]
View: TypeAlias = Annotated[
    str, option("--view", help="The view to begin with, as the page's `Copy command` gives it.")
]
Port: TypeAlias = Annotated[
    int, option("--port", help="The port to serve on; 0 takes a free one.", min=0, max=65535)
]
NoBrowser: TypeAlias = Annotated[
    bool, option("--no-browser", help="Print the page's address, and open nothing.")
]
MaxRows: TypeAlias = Annotated[
    int | None, option("--max-rows", help="The most rows of a forward pass.", min=1)
]
Memory: TypeAlias = Annotated[
    str | None,
    option("--memory", help="The most memory a forward pass may take, such as 2GiB; half of what is free."),
]


def switch(name: str, *, help: str) -> Any:  # noqa: A002 (typer's own name for it)
    """A typer option that is on, and that `--no-...` and a `PATCHSCOPE_` variable can turn off."""
    word = name.replace("_", "-")
    return typer.Option(f"--{word}/--no-{word}", help=help, envvar=f"PATCHSCOPE_{name.upper()}")


class Best(StrEnum):
    """What the best can be taken over."""

    source_layer = "source_layer"
    target_layer = "target_layer"


PageFile: TypeAlias = Annotated[
    Path | None, option("--out", help="Write a page that shows the runs side by side, such as page.html.")
]
BestOver: TypeAlias = Annotated[
    list[Best] | None,
    option("--best-over", help="Take the best over these layers first, of controls too. Repeatable."),
]


class Context(StrEnum):
    """How source and target share an nnsight context."""

    auto = "auto"
    fused = "fused"
    session = "session"
    nested = "nested"
    bridged = "bridged"


ContextName: TypeAlias = Annotated[
    Context, option("--context", help="How source and target share an nnsight context.")
]


# What `fit` takes.
FitFile: TypeAlias = Annotated[Path, option("--out", help="The safetensors file to write.")]
Texts: TypeAlias = Annotated[
    str | None,
    option(
        "--data", help="Texts: builtin:NAME, a file, or hub:ORG/NAME:SPLIT; texts that ship unless given."
    ),
]
Column: TypeAlias = Annotated[str | None, option("--column", help="The column that holds the texts.")]
HeldOut: TypeAlias = Annotated[
    str, option("--held-out", help="The share of the texts to measure on, or data, as --data.")
]
Pairs: TypeAlias = Annotated[
    str,
    option("--pairs", help="same (l to l), last (l to the last block), cross, or l:l*, for example 3:5,4:6."),
]
SourceLayers: TypeAlias = Annotated[
    str, option("--source-layers", help="The l of same, last and cross, as --layer.")
]
TargetLayers: TypeAlias = Annotated[str, option("--target-layers", help="The l* of cross, as --layer.")]
TextLimit: TypeAlias = Annotated[int | None, option("--limit", help="The most texts.", min=3)]
Positions: TypeAlias = Annotated[
    int, option("--positions", help="How many positions of a text, at random; 0 is all.", min=0)
]
MaxTokens: TypeAlias = Annotated[
    int, option("--max-tokens", help="How many tokens of a text are read.", min=2)
]
Rank: TypeAlias = Annotated[int | None, option("--rank", help="The rank of low_rank.", min=1)]
Seed: TypeAlias = Annotated[int, option("--seed", help="Of the choice of texts and positions.", min=0)]


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def memory_value(given: str | None) -> int | None:
    """A size in bytes, as `--memory` gives it: a number, or one with a unit (2GiB and 2GB are both 2**31).

    Raises:
        InputError: It is no size.
    """
    if given is None:
        return None
    found = _SIZE.fullmatch(given.strip())
    if found is None:
        raise InputError(
            f"--memory={given!r} is no size.", hint="Write bytes, or for example 500MiB or 2GiB."
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def remote_value(given: str | None) -> bool | str:
    """What `--remote` gives to `run`."""
    return {None: False, "no": False, "ndif": True}.get(given, given or False)


def source_remote_value(given: str | None) -> bool | str | None:
    """What `--source-remote` gives to `run`."""
    return None if given is None else remote_value(given)


def parse_selector(text: str, *, option: str) -> Any:
    """A layer or position as YAML reads it: `3`, `[1, 2]`, `0:10`, `all`, or a text.

    Raises:
        InputError: The text is no YAML.
    """
    import yaml

    if ":" in text and not text.startswith(("{", "[")):
        # `0:10` and `first:x` are texts here, where YAML 1.1 sees a base-60 number or a mapping.
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"{option}={text!r} cannot be read as YAML.",
            hint="Give an index, a list such as [0, 4], or a text.",
        ) from error
