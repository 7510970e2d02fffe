"""`patchscope run` and `patchscope plan`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchscope_nn.cli import groups, options, printing

if TYPE_CHECKING:
    from patchscope_nn.runs.experiments import Experiment
    from patchscope_nn.runs.prepared import Prepared, PreparedRun
    from patchscope_nn.runs.results import Run

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
    shard: options.Shard = None,
    reuse: options.Reuse = None,
    report: options.Report = True,
    planning: groups.Planning,
    switches: groups.Switches,
    json: options.Json = False,
    log_level: options.Level = "warning",  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Run a recipe. The same command resumes an interrupted run; finished cells are not run again.

    With more rows (--limit), layers, positions or controls and the same --out, it runs what is missing.
    """
    prepared = _prepare(recipe, models, sets=sets, limit=limit, shard=shard, quiet=json)
    from patchscope_nn.backends.jobs.job_size import JOBS
    from patchscope_nn.runs.execute import Execution
    from patchscope_nn.runs.run import run_prepared

    folder = out or prepared.default_folder
    progress = printing.Progress(prepared.name, quiet=json)
    command = shlex.join(["patchscope", *sys.argv[1:]])
    executing = planning.execution_options(switches) | {
        "jobs": jobs or JOBS,
        "command": command,
        "report": report,
        "reuse": tuple(reuse or ()),
    }
    execution = Execution(**executing, progress=progress, notice=progress.tell)
    fitted = {name: _fitted(method, command=command, quiet=json) for name, method in prepared.runs.items()}
    try:
        finished = run_prepared(replace(prepared, runs=fitted), execution, out=folder)
    except KeyboardInterrupt:
        printing.note(f"\nInterrupted. Finished cells are kept in {folder}; continue with:\n  {command}")
        for run_folder in prepared.folders(folder).values():
            _leave_or_cancel(run_folder)
        raise typer.Exit(_INTERRUPTED) from None
    print_finished(finished, as_json=json)


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the whole run.")],
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="All shards of a run, or runs over different data rows."),
    ],
    *,
    report: options.Report = True,
    json: options.Json = False,
) -> None:
    """Join finished runs into one. Checks that no cell is missing or in two of them."""
    from patchscope_nn.runs.merge import merge as merge_runs

    with printing.waiting("merging", quiet=json):
        merged = merge_runs(folders, out=out, report=report)
    print_finished(merged, as_json=json)


def print_finished(finished: Run | Experiment, *, as_json: bool) -> None:
    """Print the results of a run, or of all methods of an experiment."""
    from patchscope_nn.cli.comparing import print_experiment
    from patchscope_nn.cli.run_printing import print_run
    from patchscope_nn.runs.results import Run

    if isinstance(finished, Run):
        print_run(finished, as_json=as_json)
    else:
        print_experiment(finished, as_json=as_json)


@groups.grouped
def plan(
    recipe: options.Recipe,
    *,
    models: groups.Models,
    sets: options.Sets = None,
    limit: options.Limit = None,
    shard: options.Shard = None,
    planning: groups.Planning,
    switches: groups.Switches,
    json: options.Json = False,
    log_level: options.Level = "warning",  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Show what a recipe would run. Prints contexts, passes, rows and tokens; no cell is computed."""
    prepared = _prepare(recipe, models, sets=sets, limit=limit, shard=shard, quiet=json)
    from patchscope_nn.backends.crossing import traffic
    from patchscope_nn.cli.plan_printing import Planned, print_plans
    from patchscope_nn.runs.execute import Execution, plan_run

    execution = Execution(**planning.execution_options(switches))
    folders = prepared.folders(prepared.default_folder)
    planned = {}
    for name, method in prepared.runs.items():
        passes, mapping = plan_run(method, execution), method.mapping
        planned[name] = Planned(passes, mapping, traffic(passes, mapping), folders[name])
    print_plans(planned, as_json=json)


def _prepare(
    recipe: str,
    models: groups.Models,
    *,
    sets: list[str] | None,
    limit: int | None,
    shard: str | None,
    quiet: bool,
) -> Prepared:
    """Read and prepare a recipe, and print the notices about its mappings."""
    from patchscope_nn.recipe import find, load_recipe

    parsed = load_recipe(recipe, sets=sets or ())
    with printing.waiting("loading the model", quiet=quiet):
        from patchscope_nn.runs.prepare import prepare

        places = models.places()
        prepared = prepare(
            parsed, base=find(recipe).parent, limit=limit, shard=shard, places=places, **models.names
        )
    for method in prepared.runs.values():
        for notice in method.mapping.notices:
            printing.caution(notice)
    return prepared


def _fitted(prepared: PreparedRun, *, command: str, quiet: bool) -> PreparedRun:
    """Fit the run's mapping with its own progress bar, if it is not fitted yet."""
    from patchscope_nn.runs.execute import fit_first

    if prepared.fit is None or prepared.fit.done:
        return prepared
    progress = printing.Progress(prepared.fit.doing, quiet=quiet, unit=prepared.fit.unit)
    return fit_first(prepared, command=command, progress=progress, notice=printing.caution)


def _leave_or_cancel(folder: Path) -> None:
    """Ask whether to leave or cancel unfinished jobs; without a terminal they are left on the server."""
    from patchscope_nn.backends.jobs.job_log import JobLog

    job_log = JobLog(folder)
    live = len(job_log.live())
    if live and sys.stdin.isatty() and _wants_cancel(live):
        job_log.drop()
        printing.note("Cancelled: their results will not be fetched. (A running job still runs to its end.)")
    elif live:
        printing.note(f"{live} jobs are left on the server; the same command fetches their results.")


def _wants_cancel(live: int) -> bool:
    question = f"{live} jobs are unfinished. Leave them, to be fetched by the same command, or cancel them?"
    while True:
        try:
            answer = typer.prompt(f"{question} [leave/cancel]", default="leave", err=True).lower()
        except (KeyboardInterrupt, typer.Abort):  # Ctrl-C again, or end of input
            return False
        if answer and "leave".startswith(answer):
            return False
        if answer and "cancel".startswith(answer):
            return True
