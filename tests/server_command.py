"""The command line of the scripts that start and stop a server for tests: `setup | up | down | status`."""

from __future__ import annotations

import sys


def run(commands, *, fail, status):
    """Run the command that `sys.argv` names, by default `status`.

    Args:
        commands: The functions `setup`, `up` and `down`, by name.
        fail: Ends the process with a message.
        status: Returns the line that `up` and `status` print.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "status"
    if name in commands:
        commands[name]()
    elif name != "status":
        fail(f"{name!r} is none of setup, up, down, status.")
    if name in ("up", "status"):
        sys.stdout.write(f"{status()}\n")
