"""`patchscope explore`: a local page for exploring a prompt."""

from __future__ import annotations

import functools
import importlib.util
import sys

from patchscope_nn.cli import groups, options, printing
from patchscope_nn.errors import InputError

_NEEDED = ("starlette", "uvicorn")


@groups.grouped
def explore(
    *,
    models: groups.Models,
    lens: options.Lenses = None,
    view: options.View = "",
    port: options.Port = 0,
    no_browser: options.NoBrowser = False,
    json: options.Json = False,
    log_level: options.Level = "warning",  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Open a local page for exploring a prompt.

    The page shows a grid of tokens x layers, and what the model says about each state.
    """
    if not all(map(importlib.util.find_spec, _NEEDED)):
        raise InputError(
            f"The explorer needs {' and '.join(_NEEDED)}, which are not installed.",
            hint="pip install 'patchscope-nn[explore]'",
        )
    # Must come before anything that imports nnsight; the module says why.
    from patchscope_nn.explore import server  # isort: skip
    from patchscope_nn.explore.answers import Answers
    from patchscope_nn.explore.copies import Options
    from patchscope_nn.explore.lenses import lenses
    from patchscope_nn.models import builtin

    given = Options(**models.placing)
    answers = Answers(lenses(lens or ()), given)
    source = models.source_model or models.model or builtin.NAME
    target = models.target_model or models.model or source
    with server.listen(port) as bound:
        with printing.waiting("loading the model", quiet=json):
            answers.load(source, target)
            answers.warm_up(source, target)
        explorer = server.Explorer(answers, models=(source, target), view=view)
        announce = functools.partial(_announce, as_json=json)
        server.serve(explorer, bound, open_browser=not no_browser, announce=announce)


def _announce(address: str, *, as_json: bool) -> None:
    if as_json:
        printing.out_json({"address": address})
    else:
        printing.out(address)
        printing.note(
            "Press Ctrl-C to stop. Keep the address private: its token gives access to this page's models."
        )
    sys.stdout.flush()  # a process that reads the address from a pipe waits for it
