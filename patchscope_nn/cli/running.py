"""`patchscope run` and `patchscope plan`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from patchscope_nn.cli import groups, options, printing
from patchscope_nn.cli.options import LogLevel

if TYPE_CHECKING:
    from patchscope_nn.runs.prepared import Prepared, PreparedRun

_INTERRUPTED = 130


@groups.grouped
def run(
    recipe: options.Recipe,
    *,
    models: groups.Models,
    jobs: options.Jobs = None,
    out: options.Out = None,
    sets: options.Sets = None,
    limit: options.Limit = None,
    planning: groups.Planning,
    switches: groups.Switches,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Run a recipe. The same command again resumes it, and computes no finished cell twice."""
    prepared = _prepare(recipe, models, sets=sets, limit=limit, quiet=json)
    from patchscope_nn.backends.ndif.job_size import JOBS
    from patchscope_nn.runs.execute import Execution
    from patchscope_nn.runs.experiments import Experiment
    from patchscope_nn.runs.run import run_prepared

    folder = out or prepared.default_folder
    progress = printing.Progress(prepared.name, quiet=json)
    command = shlex.join(["patchscope", *sys.argv[1:]])
    execution = Execution(
        **planning.given(switches),
        jobs=jobs or JOBS,
        progress=progress,
        notice=progress.tell,
        command=command,
    )
    fitted = {name: _fitted(one, command=command, quiet=json) for name, one in prepared.runs.items()}
    try:
        finished = run_prepared(replace(prepared, runs=fitted), execution, out=folder)
    except KeyboardInterrupt:
        printing.note(f"\nInterrupted. What is done is kept in {folder}; go on with:\n  {command}")
        for run_folder in prepared.folders(folder).values():
            _leave_or_cancel(run_folder)
        raise typer.Exit(_INTERRUPTED) from None
    if isinstance(finished, Experiment):
        from patchscope_nn.cli.comparing import print_experiment

        print_experiment(finished, as_json=json)
    else:
        from patchscope_nn.cli.run_printing import print_run

        print_run(finished, as_json=json)


@groups.grouped
def plan(
    recipe: options.Recipe,
    *,
    models: groups.Models,
    sets: options.Sets = None,
    limit: options.Limit = None,
    planning: groups.Planning,
    switches: groups.Switches,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Show what would run, before it runs: contexts, passes, rows and tokens."""
    prepared = _prepare(recipe, models, sets=sets, limit=limit, quiet=json)
    from patchscope_nn.backends.crossing import traffic
    from patchscope_nn.cli.plan_printing import Planned, print_plans
    from patchscope_nn.runs.execute import Execution, plan_run

    execution = Execution(**planning.given(switches))
    folders = prepared.folders(prepared.default_folder)
    planned = {}
    for name, method in prepared.runs.items():
        made = plan_run(method, execution)
        planned[name] = Planned(
            plan=made,
            mapping=method.mapping,
            crossing=traffic(made, method.mapping),
            folder=folders[name],
        )
    print_plans(planned, as_json=json)


def _prepare(
    recipe: str, models: groups.Models, *, sets: list[str] | None, limit: int | None, quiet: bool
) -> Prepared:
    """Read a recipe and prepare it, and print what a researcher should know of its mappings."""
    from patchscope_nn.recipe import find, load_recipe

    parsed = load_recipe(recipe, sets=sets or ())
    with printing.waiting("loading the model", quiet=quiet):
        from patchscope_nn.runs.prepare import prepare

        prepared = prepare(
            parsed, base=find(recipe).parent, limit=limit, places=models.places(), **models.names
        )
    for method in prepared.runs.values():
        for notice in method.mapping.notices:
            printing.caution(notice)
    return prepared


def _fitted(prepared: PreparedRun, *, command: str, quiet: bool) -> PreparedRun:
    """The run with its mapping fitted, where that is still to be done, with a bar of its own."""
    from patchscope_nn.runs.execute import fit_first

    if prepared.fit is None or prepared.fit.done:
        return prepared
    progress = printing.Progress(prepared.fit.doing, quiet=quiet, unit=prepared.fit.unit)
    return fit_first(prepared, command=command, progress=progress, notice=printing.caution)


def _leave_or_cancel(folder: Path) -> None:
    """Ask what becomes of the jobs that are on their way; where nobody can answer they are left."""
    from patchscope_nn.backends.ndif.job_log import JobLog

    job_log = JobLog(folder)
    live = len(job_log.live())
    if live and sys.stdin.isatty() and _wants_cancel(live):
        job_log.drop()
        printing.note("Cancelled: their results will not be fetched. (A server that has begun one ends it.)")
    elif live:
        printing.note(f"{live} jobs are left on their server; the same command fetches them.")


def _wants_cancel(live: int) -> bool:
    asked = f"{live} jobs are on their way. Leave them, to be fetched by the same command, or cancel them?"
    while True:
        try:
            answer = typer.prompt(f"{asked} [leave/cancel]", default="leave", err=True).lower()
        except (KeyboardInterrupt, typer.Abort):  # Ctrl-C again, or the end of the input
            return False
        if answer and "leave".startswith(answer):
            return False
        if answer and "cancel".startswith(answer):
            return True
