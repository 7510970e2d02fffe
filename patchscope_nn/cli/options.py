"""The options that commands share. Each can also be set by an environment variable, `PATCHSCOPE_...`."""

from __future__ import annotations

import logging
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from patchscope_nn.errors import InputError


def option(*names: str, help: str, **more: Any) -> Any:  # noqa: A002 (typer's own name for it)
    """Return a typer option that can also be set by the environment variable `PATCHSCOPE_NAME`."""
    variable = "PATCHSCOPE_" + names[0].removeprefix("--").upper().replace("-", "_")
    return typer.Option(*names, help=help, envvar=variable, show_envvar=False, **more)


class LogLevel(StrEnum):
    """The lowest level of messages that are logged to stderr."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def _set_log_level(level: LogLevel) -> LogLevel:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("patchscope_nn").setLevel(level.upper())
    return level


Recipe: TypeAlias = Annotated[
    str, typer.Argument(help="Name (see `patchscope recipes`) or file of a recipe; - reads standard input.")
]
Model: TypeAlias = Annotated[
    str | None,
    option("--model", help="Source and target model: Hugging Face id, folder or builtin:NAME."),
]
SourceModel: TypeAlias = Annotated[
    str | None, option("--source-model", help="The source model M, whose states are read.")
]
TargetModel: TypeAlias = Annotated[
    str | None, option("--target-model", help="The target model M*, into which states are written.")
]
Dtype: TypeAlias = Annotated[
    str, option("--dtype", help="float32, bfloat16, float16, or auto: the checkpoint's own dtype.")
]
DeviceMap: TypeAlias = Annotated[
    str | None, option("--device-map", help="The device map for transformers: cpu, cuda, auto, ...")
]
Position: TypeAlias = Annotated[
    str, option("--position", help="The token to read: an index (-1 is the last) or a text of the prompt.")
]
Layer: TypeAlias = Annotated[str, option("--layer", help="The layers to read: all, 5, [0, 4, 8] or 0:10.")]
TargetLayer: TypeAlias = Annotated[
    str, option("--target-layer", help="The layers to write to: same, or as --layer.")
]
MaxNewTokens: TypeAlias = Annotated[
    int, option("--max-new-tokens", help="The maximum number of tokens to generate.", min=1)
]
Remote: TypeAlias = Annotated[
    str | None,
    option(
        "--remote",
        help="Where M* runs: ndif (as nnsight is configured), a URL, or local (a rehearsal on this machine).",
        metavar="ndif|URL|local",
    ),
]
SourceRemote: TypeAlias = Annotated[
    str | None,
    option("--source-remote", help="Where M runs: as --remote, or no (this machine). Default: as M*."),
]
Jobs: TypeAlias = Annotated[
    int | None,
    option("--jobs", help="The maximum number of unfinished jobs on a server. Default: 4.", min=1),
]
Out: TypeAlias = Annotated[Path | None, option("--out", help="The run's folder. Default: runs/NAME-HASH.")]
Figures: TypeAlias = Annotated[
    Path | None,
    option("--figures", help="Also write the figures to this folder, as PDF, SVG and PNG.", metavar="DIR"),
]
Sets: TypeAlias = Annotated[
    list[str] | None,
    option("--set", help="Change a field of the recipe: key.path=value. Repeatable.", metavar="KEY=VALUE"),
]
Limit: TypeAlias = Annotated[int | None, option("--limit", help="The maximum number of data rows.", min=1)]
Json: TypeAlias = Annotated[bool, option("--json", help="Print JSON instead of tables.")]
Level: TypeAlias = Annotated[
    LogLevel, option("--log-level", help="The lowest level of messages to log.", callback=_set_log_level)
]
Lenses: TypeAlias = Annotated[
    list[str] | None,
    option("--lens", help="Another next_token recipe to read the grid with. Repeatable.", metavar="RECIPE"),
]
View: TypeAlias = Annotated[
    str, option("--view", help="The view to open, as copied by the page's `Copy command`.")
]
Port: TypeAlias = Annotated[
    int, option("--port", help="The port to serve on; 0 chooses a free one.", min=0, max=65535)
]
NoBrowser: TypeAlias = Annotated[
    bool, option("--no-browser", help="Print the page's address without opening a browser.")
]
MaxRows: TypeAlias = Annotated[
    int | None, option("--max-rows", help="The maximum number of rows in a forward pass.", min=1)
]
Memory: TypeAlias = Annotated[
    str | None,
    option(
        "--memory", help="The maximum memory of a forward pass, e.g. 2GiB. Default: half of what is free."
    ),
]


def switch(name: str, *, help: str) -> Any:  # noqa: A002 (typer's own name for it)
    """Return a typer option that is on by default; `--no-NAME` or `PATCHSCOPE_NAME=0` turns it off."""
    word = name.replace("_", "-")
    return typer.Option(f"--{word}/--no-{word}", help=help, envvar=f"PATCHSCOPE_{name.upper()}")


class Best(StrEnum):
    """The axes over which the best value can be taken."""

    source_layer = "source_layer"
    target_layer = "target_layer"


PageFile: TypeAlias = Annotated[
    Path | None, option("--out", help="Write a page that compares the runs to this HTML file.")
]
BestOver: TypeAlias = Annotated[
    list[Best] | None,
    option("--best-over", help="Take the best over these layers first, for controls too. Repeatable."),
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


# The options of `fit`.
FitFile: TypeAlias = Annotated[Path, option("--out", help="The safetensors file to write.")]
Texts: TypeAlias = Annotated[
    str | None,
    option(
        "--data", help="Texts: builtin:NAME, a file, or hub:ORG/NAME:SPLIT. Default: texts of this package."
    ),
]
Column: TypeAlias = Annotated[str | None, option("--column", help="The column that holds the texts.")]
HeldOut: TypeAlias = Annotated[
    str,
    option("--held-out", help="The share of the texts held out for scoring, or other texts, as --data."),
]
Pairs: TypeAlias = Annotated[
    str,
    option(
        "--pairs",
        help="same (l to l), last (l to the last block), cross (all), or l:l*, e.g. 3:5,4:6.",
    ),
]
SourceLayers: TypeAlias = Annotated[
    str, option("--source-layers", help="The layers l for same, last and cross, as --layer.")
]
TargetLayers: TypeAlias = Annotated[
    str, option("--target-layers", help="The layers l* for cross, as --layer.")
]
TextLimit: TypeAlias = Annotated[int | None, option("--limit", help="The maximum number of texts.", min=3)]
Positions: TypeAlias = Annotated[
    int, option("--positions", help="The number of random positions per text; 0 uses all.", min=0)
]
MaxTokens: TypeAlias = Annotated[
    int, option("--max-tokens", help="The maximum number of tokens read per text.", min=2)
]
Rank: TypeAlias = Annotated[int | None, option("--rank", help="The rank, for kind low_rank.", min=1)]
Seed: TypeAlias = Annotated[int, option("--seed", help="The seed for choosing texts and positions.", min=0)]


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def memory_value(text: str | None) -> int | None:
    """Parse a size in bytes: a number, with or without a unit (2GiB and 2GB are both 2**31)."""
    if text is None:
        return None
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        raise InputError(
            f"--memory={text!r} is not a valid size.", hint="Write bytes, or for example 500MiB or 2GiB."
        )
    return int(float(size[1]) * _UNITS[size[2].upper()])


def remote_value(text: str | None) -> bool | str:
    """Convert the value of `--remote` to the argument `remote` of `run`."""
    return {None: False, "no": False, "ndif": True}.get(text, text or False)


def source_remote_value(text: str | None) -> bool | str | None:
    """Convert the value of `--source-remote` to the argument `source_remote` of `run`."""
    return None if text is None else remote_value(text)


def parse_selector(text: str, *, option: str) -> Any:
    """Parse a layer or position like YAML does: `3`, `[1, 2]`, `0:10`, `all`, or a text."""
    import yaml

    if ":" in text and not text.startswith(("{", "[")):
        # `0:10` and `first:x` are texts here; YAML 1.1 would read a base-60 number or a mapping.
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"{option}={text!r} cannot be read as YAML.",
            hint="Give an index, a list such as [0, 4], or a text.",
        ) from error
