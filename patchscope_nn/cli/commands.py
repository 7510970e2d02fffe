"""The commands. Each imports what it needs only when it runs, so that `--help` and `lint` are fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchscope_nn import __version__
from patchscope_nn.cli import groups, options, printing
from patchscope_nn.cli.running import plan, run

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
app.command()(plan)


@app.command()
def jobs(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, finished or not.")],
    *,
    json: options.Json = False,
) -> None:
    """List the jobs that a run sent to a server, and their states."""
    from patchscope_nn.backends.ndif.job_log import JobLog
    from patchscope_nn.runs.manifest import read_manifest

    read_manifest(folder)
    printing.print_jobs(JobLog(folder).jobs(), as_json=json)


@app.command()
def doctor(
    *,
    model: options.Model = None,
    remote: options.Remote = None,
    json: options.Json = False,
) -> None:
    """Check the installation, a model or a server.

    With --model, prove the model: show what was compared with plain hooks, and what is switched off for it.
    With --remote, check the server: its versions and models, your key, and a round trip.
    """
    from patchscope_nn.backends import Ndif, Places
    from patchscope_nn.models import builtin
    from patchscope_nn.runs.doctor import check_here, check_model, check_server

    findings = list(check_here())
    verdict = None
    place = Places.of(options.remote_value(remote)).target
    if isinstance(place, Ndif):
        with printing.waiting("asking the server", quiet=json):
            findings += check_server(place.host, model or builtin.NAME)
    elif model is not None:
        with printing.waiting("proving the model", quiet=json):
            finding, verdict = check_model(model)
        findings.append(finding)
    printing.print_findings(findings, verdict=verdict, as_json=json)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)
