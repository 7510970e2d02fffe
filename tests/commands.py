"""The command line, called in this process, which has torch loaded already."""

from __future__ import annotations

import sys
from typing import NamedTuple

from patchscope_nn import cli


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def caller(monkeypatch, capsys):
    """call(*words): `patchscope` with these words."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["patchscope", *words])
        try:
            cli.main()
        except SystemExit as end:
            return Done(end.code or 0, *capsys.readouterr())
        return Done(0, *capsys.readouterr())

    return call
