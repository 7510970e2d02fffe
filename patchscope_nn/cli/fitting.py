"""`patchscope fit KIND`: fit a mapping or a prompt, score it on held-out data, and save it."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from patchscope_nn.errors import InputError


class _Fits(TyperGroup):
    """The kinds of fit; commands of trained kinds are made when needed, because they import torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all kinds."""
        self._add_trained()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a kind."""
        if cmd_name not in self.commands:
            self._add_trained()
        return super().get_command(ctx, cmd_name)

    def _add_trained(self) -> None:
        from patchscope_nn.cli.fitting_trained import command_of
        from patchscope_nn.fitting.trained.kinds import KINDS

        for name, kind in KINDS.items():
            if name not in self.commands:
                info = CommandInfo(name=name, callback=command_of(kind))
                command = get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode=None)
                self.add_command(command)


fit = typer.Typer(
    cls=_Fits,
    help="Fit a mapping or a prompt, score it on held-out data, and save it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def parse_data(text: str) -> dict[str, Any]:
    """The fields of a `DataSpec`, as `--data` gives them.

    Raises:
        InputError: A Hub data set is named without its split.
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
