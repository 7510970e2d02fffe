"""Models: a folder each, named in tables and figures as on the Hub."""

from __future__ import annotations

from dataclasses import replace

from patchscope_nn.models import Model, load


def load_named(given: str, *, dtype: str) -> Model:
    """A model of `NAME=FOLDER`, or of a name alone, which then says where it is found.

    Args:
        given: `Qwen/Qwen2.5-Coder-0.5B-Instruct=models/qwen`, or `builtin:smollm2-135m-instruct`.
        dtype: As in `load`.

    Returns:
        The model, under its name.
    """
    name, _, folder = given.partition("=")
    model = load(folder or name, dtype=dtype)
    return replace(model, info=replace(model.info, name=name))


def short(name: str) -> str:
    """What files of a model are called: the last part of its name, in lower case."""
    return name.rpartition("/")[2].removeprefix("builtin:").lower()
