"""The command line, `patchscope`: parsing and printing only.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted (the run can be resumed).
"""

from __future__ import annotations

import io
import sys
from typing import NoReturn

from patchscope_nn._util.plain import wrong_text
from patchscope_nn.cli.commands import app
from patchscope_nn.cli.printing import print_error
from patchscope_nn.errors import InputError, PatchscopeError, RunError


def main() -> None:
    """Run the command line, and turn the package's errors into messages and exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A model may generate characters that the terminal cannot encode; they are shown escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        for word in sys.argv[1:]:
            if problem := wrong_text(word):
                raise InputError(f"{problem}.")
        app(prog_name="patchscope")
    except PatchscopeError as error:
        _end(error)
    except OSError as error:
        # For example a full disk or a read-only folder. This is not a bug, so no traceback is shown.
        _end(RunError(f"{error}.", hint="Once this is fixed, the same command continues the run."))


def _end(error: PatchscopeError) -> NoReturn:
    print_error(error, as_json="--json" in sys.argv)
    sys.exit(2 if isinstance(error, InputError) else 1)


__all__ = ["app", "main"]
