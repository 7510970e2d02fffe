"""The options that commands share. Each can also be set by an environment variable, `PATCHSCOPE_...`."""

from __future__ import annotations

import logging
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from patchscope_nn.errors import InputError


def option(name: str, help: str, **more: Any) -> Any:  # noqa: A002 (typer's own name for it)
    """Return a typer option that can also be set by the environment variable `PATCHSCOPE_NAME`."""
    variable = "PATCHSCOPE_" + name.removeprefix("--").upper().replace("-", "_")
    return typer.Option(name, help=help, envvar=variable, show_envvar=False, **more)


def switch(name: str, help: str) -> Any:  # noqa: A002 (typer's own name for it)
    """Return an option that is on by default; `--no-NAME` or `PATCHSCOPE_NAME=0` turns it off."""
    word = name.replace("_", "-")
    return typer.Option(f"--{word}/--no-{word}", help=help, envvar=f"PATCHSCOPE_{name.upper()}")


def _set_log_level(level: str) -> str:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("patchscope_nn").setLevel(level.upper())
    return level


Recipe = Annotated[
    str, typer.Argument(help="Name (see `patchscope recipes`) or file of a recipe; - reads standard input.")
]
Model = Annotated[
    str | None, option("--model", "Source and target model: Hugging Face id, folder or builtin:NAME.")
]
SourceModel = Annotated[str | None, option("--source-model", "The source model M, whose states are read.")]
TargetModel = Annotated[
    str | None, option("--target-model", "The target model M*, into which states are written.")
]
Dtype = Annotated[str, option("--dtype", "float32, bfloat16, float16, or auto: the checkpoint's own dtype.")]
DeviceMap = Annotated[
    str | None, option("--device-map", "The device map for transformers: cpu, cuda, auto, ...")
]
Engine = Annotated[
    str | None,
    option("--engine", "The engine of M*: transformers (the default) or vllm.", metavar="transformers|vllm"),
]
SourceEngine = Annotated[
    str | None,
    option("--source-engine", "The engine of M. Default: as M*, where M runs in the same place."),
]
EngineArgs = Annotated[
    list[str] | None,
    option(
        "--engine-args", "An argument of vLLM, e.g. tensor_parallel_size=4. Repeatable.", metavar="KEY=VALUE"
    ),
]
Position = Annotated[
    str, option("--position", "The token to read: an index (-1 is the last) or a text of the prompt.")
]
Layer = Annotated[str, option("--layer", "The layers to read: all, 5, [0, 4, 8] or 0:10.")]
TargetLayer = Annotated[str, option("--target-layer", "The layers to write to: same, or as --layer.")]
MaxNewTokens = Annotated[int, option("--max-new-tokens", "The maximum number of tokens to generate.", min=1)]
Remote = Annotated[
    str | None,
    option(
        "--remote",
        "Where M* runs: ndif (as nnsight is configured), the URL of an NDIF, vllm+http://... (of `patchscope "
        "serve`), or local (a rehearsal on this machine).",
        metavar="ndif|URL|local",
    ),
]
SourceRemote = Annotated[
    str | None, option("--source-remote", "Where M runs: as --remote, or no (this machine). Default: as M*.")
]
Jobs = Annotated[
    int | None, option("--jobs", "The maximum number of unfinished jobs on a server. Default: 4.", min=1)
]
Out = Annotated[Path | None, option("--out", "The run's folder. Default: runs/NAME-HASH.")]
Report = Annotated[
    bool, switch("report", "Write the report at the end; `patchscope report` writes it later.")
]
Figures = Annotated[
    Path | None,
    option("--figures", "Also write the figures to this folder, as PDF, SVG and PNG.", metavar="DIR"),
]
Sets = Annotated[
    list[str] | None,
    option("--set", "Change a field of the recipe: key.path=value. Repeatable.", metavar="KEY=VALUE"),
]
Limit = Annotated[int | None, option("--limit", "The maximum number of data rows.", min=1)]
Shard = Annotated[
    str | None,
    option(
        "--shard", "Run one part of the recipe: 3/16 is the third of 16. `merge` joins them.", metavar="K/N"
    ),
]
Reuse = Annotated[
    list[Path] | None,
    option("--reuse", "Take finished cells from the folder of another run. Repeatable.", metavar="RUN"),
]
Json = Annotated[bool, option("--json", "Print JSON instead of tables.")]
Level = Annotated[
    Literal["debug", "info", "warning", "error"],
    option("--log-level", "The lowest level of messages to log.", callback=_set_log_level),
]
Lenses = Annotated[
    list[str] | None,
    option("--lens", "Another next_token recipe to read the grid with. Repeatable.", metavar="RECIPE"),
]
View = Annotated[str, option("--view", "The view to open, as copied by the page's `Copy command`.")]
Port = Annotated[int, option("--port", "The port to serve on; 0 chooses a free one.", min=0, max=65535)]
NoBrowser = Annotated[bool, option("--no-browser", "Print the page's address without opening a browser.")]
MaxRows = Annotated[int | None, option("--max-rows", "The maximum number of rows in a forward pass.", min=1)]
Memory = Annotated[
    str | None,
    option("--memory", "The maximum memory of a forward pass, e.g. 2GiB. Default: half of what is free."),
]

#: The axes over which the best value can be taken.
Best = StrEnum("Best", ["source_layer", "target_layer"])

PageFile = Annotated[Path | None, option("--out", "Write a page that compares the runs to this HTML file.")]
BestOver = Annotated[
    list[Best] | None,
    option("--best-over", "Take the best over these layers first, for controls too. Repeatable."),
]

ContextName = Annotated[
    Literal["auto", "fused", "session", "nested", "bridged"],
    option("--context", "How source and target share an nnsight context."),
]

# The options of `fit`.
FitFile = Annotated[Path, option("--out", "The safetensors file to write.")]
Texts = Annotated[
    str | None,
    option("--data", "Texts: builtin:NAME, a file, or hub:ORG/NAME:SPLIT. Default: texts of this package."),
]
Column = Annotated[str | None, option("--column", "The column that holds the texts.")]
HeldOut = Annotated[
    str, option("--held-out", "The share of the texts held out for scoring, or other texts, as --data.")
]
Pairs = Annotated[
    str, option("--pairs", "same (l to l), last (l to the last block), cross (all), or l:l*, e.g. 3:5,4:6.")
]
SourceLayers = Annotated[str, option("--source-layers", "The layers l for same, last and cross, as --layer.")]
TargetLayers = Annotated[str, option("--target-layers", "The layers l* for cross, as --layer.")]
TextLimit = Annotated[int | None, option("--limit", "The maximum number of texts.", min=3)]
Positions = Annotated[
    int, option("--positions", "The number of random positions per text; 0 uses all.", min=0)
]
MaxTokens = Annotated[int, option("--max-tokens", "The maximum number of tokens read per text.", min=2)]
Rank = Annotated[int | None, option("--rank", "The rank, for kind low_rank.", min=1)]
Seed = Annotated[int, option("--seed", "The seed for choosing texts and positions.", min=0)]

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


def engine_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """Parse the values of `--engine-args`, each `KEY=VALUE`."""
    arguments: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(
                f"--engine-args={pair!r} is not KEY=VALUE.", hint="For example tensor_parallel_size=4."
            )
        arguments[name.strip().replace("-", "_")] = parse_selector(value, option="--engine-args")
    return arguments


def parse_selector(text: str, *, option: str) -> Any:
    """Parse a layer or position by the rules of recipes: `3`, `[1, 2]`, `0:10`, `all`, or a text."""
    from patchscope_nn.recipe.document import read_yaml

    if ":" in text and not text.startswith(("{", "[")):
        return text  # `first:x` is a text here; in a recipe, `first: x` is a mapping
    document = read_yaml(text)
    if document.problems:
        raise InputError(
            f"{option}={text!r} {document.problems[0].message}",
            hint="Give an index, a list such as [0, 4], or a text.",
        )
    return document.value
