"""The commands. Each imports what it needs only when it runs, so that `--help` and `lint` are fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchscope_nn import __version__
from patchscope_nn.cli import groups, options, printing
from patchscope_nn.cli.explorer import explore
from patchscope_nn.cli.fitting_closed import fit
from patchscope_nn.cli.running import merge, plan, run
from patchscope_nn.cli.serving import serve

app = typer.Typer(
    help="Ask a language model, in its own words, what one of its hidden states means.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:  # noqa: FBT001 (typer's callback)
    if wanted:
        printing.out(__version__)
        raise typer.Exit


@app.callback()
def _main(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Ask a language model, in its own words, what one of its hidden states means."""


@app.command()
@groups.grouped
def explain(
    prompt: Annotated[str, typer.Argument(help="The source prompt.")],
    *,
    position: options.Position = "-1",
    layer: options.Layer = "all",
    target_layer: options.TargetLayer = "same",
    max_new_tokens: options.MaxNewTokens = 16,
    models: groups.Models,
    json: options.Json = False,
    log_level: options.Level = "warning",  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Show what the model says about a hidden state, layer by layer."""
    with printing.waiting("loading the model", quiet=json):
        from patchscope_nn.runs.explain import look, prepare_look
        from patchscope_nn.spec import Source

        prepared = prepare_look(
            Source(
                prompt=prompt,
                position=options.parse_selector(position, option="--position"),
                layer=options.parse_selector(layer, option="--layer"),
            ),
            target_layer=options.parse_selector(target_layer, option="--target-layer"),
            max_new_tokens=max_new_tokens,
            places=models.places(),
            **models.names,
        )
    printing.print_look(look(prepared, progress=printing.Progress("explaining", quiet=json)), as_json=json)


app.command()(run)
app.command()(merge)
app.command()(plan)


@app.command()
def jobs(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, finished or not.")],
    *,
    json: options.Json = False,
) -> None:
    """List the jobs that a run sent to a server, and their states."""
    from patchscope_nn.backends.jobs.job_log import JobLog
    from patchscope_nn.runs.manifest import read_manifest

    read_manifest(folder)
    printing.print_jobs(JobLog(folder).jobs(), as_json=json)


@app.command()
def doctor(*, model: options.Model = None, remote: options.Remote = None, json: options.Json = False) -> None:
    """Check the installation, a model or a server.

    With --model, prove the model: show what was compared with plain hooks, and what is switched off for it.
    With --remote, check the server (an NDIF, or `vllm+http://...`): versions, models, key, and a round trip.
    """
    from patchscope_nn.backends import Ndif, Places, Served
    from patchscope_nn.models import builtin
    from patchscope_nn.runs.doctor import check_here, check_model, check_served, check_server

    findings = list(check_here())
    verdict = None
    place = Places.of(options.remote_value(remote)).target
    if isinstance(place, Ndif):
        with printing.waiting("asking the server", quiet=json):
            findings += check_server(place.host, model or builtin.NAME)
    elif isinstance(place, Served):
        with printing.waiting("asking the server", quiet=json):
            findings += check_served(place.host, model or builtin.NAME)
    elif model is not None:
        with printing.waiting("proving the model", quiet=json):
            finding, verdict = check_model(model)
        findings.append(finding)
    printing.print_findings(findings, verdict=verdict, as_json=json)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, finished or not, or of an experiment.")
    ],
    *,
    figures: options.Figures = None,
    json: options.Json = False,
) -> None:
    """Rebuild the HTML report of a run. For an experiment, also rebuild the reports of its methods."""
    from patchscope_nn.runs.experiments import Experiment, open_finished

    finished = open_finished(folder)
    pages = [finished.report()]
    if isinstance(finished, Experiment):
        pages += [run.report() for run in finished.values()]
    files = [] if figures is None else finished.save_figures(figures)
    printing.print_report(pages, figures=files, as_json=json)


@app.command()
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs; all others are compared with the first."),
    ],
    *,
    out: options.PageFile = None,
    best_over: options.BestOver = None,
    json: options.Json = False,
) -> None:
    """Compare runs cell by cell. Prints paired differences with intervals for each metric."""
    from patchscope_nn.cli.comparing import print_compared
    from patchscope_nn.runs.experiments import compare_runs, load_runs, write_page

    runs = load_runs(folders)
    comparison = compare_runs(runs, best=[axis.value for axis in best_over] if best_over else None)
    title = f"{', '.join(comparison.names[1:])} compared with {comparison.names[0]}"
    page = None if out is None else write_page(comparison, runs, path=out, title=title)
    print_compared(comparison, page=page, title=title, as_json=json)


app.command()(explore)
app.command()(serve)


@app.command()
def lint(
    files: Annotated[
        list[str], typer.Argument(help="Recipe files, or names of included recipes; - reads standard input.")
    ],
    *,
    json: options.Json = False,
) -> None:
    """Check recipes without loading a model. All problems are listed, each with its line."""
    from patchscope_nn.recipe import lint as problems_of

    problems = {file: problems_of(file) for file in files}
    printing.print_problems(problems, as_json=json)
    if any(problems.values()):
        raise typer.Exit(2)


@app.command()
def recipes(*, json: options.Json = False) -> None:
    """List the included recipes and their costs."""
    from patchscope_nn.runs.costs import costs

    with printing.waiting("counting cells", quiet=json):
        counted = costs()
    printing.print_recipes(counted, as_json=json)


app.add_typer(fit, name="fit")
