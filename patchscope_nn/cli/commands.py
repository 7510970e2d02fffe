"""The commands. Each imports what it needs when it runs, so that `--help` and `lint` answer at once."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from patchscope_nn import __version__
from patchscope_nn.backends.ndif.job_size import JOBS
from patchscope_nn.cli import options, printing
from patchscope_nn.cli.options import Context, LogLevel

app = typer.Typer(
    help="Ask a language model, in its own words, what one of its hidden states means.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_INTERRUPTED = 130


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
def explain(
    prompt: Annotated[str, typer.Argument(help="The source prompt.")],
    *,
    position: options.Position = "-1",
    layer: options.Layer = "all",
    target_layer: options.TargetLayer = "same",
    max_new_tokens: options.MaxNewTokens = 16,
    model: options.Model = None,
    source_model: options.SourceModel = None,
    target_model: options.TargetModel = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    remote: options.Remote = None,
    source_remote: options.SourceRemote = None,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """The quick look: layer by layer, what the model says a hidden state is."""
    with printing.waiting("loading the model", quiet=json):
        from patchscope_nn.runs.explain import explain as quick_look
        from patchscope_nn.runs.prepare import load_models

        source, target = load_models(
            model=model,
            source_model=source_model,
            target_model=target_model,
            dtype=dtype,
            device_map=device_map,
            remote=options.remote_value(remote),
            source_remote=options.source_remote_value(source_remote),
        )
    look = quick_look(
        prompt,
        position=options.parse_selector(position, option="--position"),
        layer=options.parse_selector(layer, option="--layer"),
        target_layer=options.parse_selector(target_layer, option="--target-layer"),
        max_new_tokens=max_new_tokens,
        remote=options.remote_value(remote),
        source_remote=options.source_remote_value(source_remote),
        progress=printing.Progress("explaining", quiet=json),
        source_model=source,
        target_model=target,
    )
    printing.print_look(look, as_json=json)


@app.command()
def run(
    recipe: options.Recipe,
    *,
    model: options.Model = None,
    source_model: options.SourceModel = None,
    target_model: options.TargetModel = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    remote: options.Remote = None,
    source_remote: options.SourceRemote = None,
    jobs: options.Jobs = JOBS,
    out: options.Out = None,
    sets: options.Sets = None,
    limit: options.Limit = None,
    context: options.ContextName = Context.auto,
    max_rows: options.MaxRows = None,
    memory: options.Memory = None,
    deduplication: options.Deduplication = True,
    source_sharing: options.SourceSharing = True,
    row_packing: options.RowPacking = True,
    cached_decoding: options.CachedDecoding = True,
    mixed_lengths: options.MixedLengths = True,
    prefix_sharing: options.PrefixSharing = True,
    late_entry: options.LateEntry = True,
    shared_attention: options.SharedAttention = True,
    lean_readout: options.LeanReadout = True,
    early_leaving: options.EarlyLeaving = True,
    memory_reuse: options.MemoryReuse = True,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Run a recipe. The same command again resumes it, and computes no finished cell twice."""
    from patchscope_nn.plan import Optimisations
    from patchscope_nn.runs.experiments import Experiment, run_prepared

    used = Optimisations(
        deduplication=deduplication,
        source_sharing=source_sharing,
        row_packing=row_packing,
        cached_decoding=cached_decoding,
        mixed_lengths=mixed_lengths,
        prefix_sharing=prefix_sharing,
        late_entry=late_entry,
        shared_attention=shared_attention,
        lean_readout=lean_readout,
        early_leaving=early_leaving,
        memory_reuse=memory_reuse,
    )
    prepared = _prepare(
        recipe,
        sets=sets,
        quiet=json,
        limit=limit,
        model=model,
        source_model=source_model,
        target_model=target_model,
        dtype=dtype,
        device_map=device_map,
        remote=options.remote_value(remote),
        source_remote=options.source_remote_value(source_remote),
    )
    folder = out or prepared.default_folder
    progress = printing.Progress(str(prepared.recipe["name"]), quiet=json)
    command = shlex.join(["patchscope", *sys.argv[1:]])
    prepared = _fitted(prepared, command=command, quiet=json)
    try:
        finished = run_prepared(
            prepared,
            out=folder,
            remote=options.remote_value(remote),
            source_remote=options.source_remote_value(source_remote),
            context=context.value,
            max_rows=max_rows,
            memory=options.memory_value(memory),
            optimisations=used,
            jobs=jobs,
            progress=progress,
            notice=progress.tell,
            command=command,
        )
    except KeyboardInterrupt:
        printing.note(f"\nInterrupted. What is done is kept in {folder}; go on with:\n  {command}")
        for place in _run_folders(prepared, folder):
            _leave_or_cancel(place)
        raise typer.Exit(_INTERRUPTED) from None
    if isinstance(finished, Experiment):
        from patchscope_nn.cli.comparing import print_experiment

        print_experiment(finished, as_json=json)
    else:
        from patchscope_nn.cli.run_printing import print_run

        print_run(finished, as_json=json)


@app.command()
def plan(
    recipe: options.Recipe,
    *,
    model: options.Model = None,
    source_model: options.SourceModel = None,
    target_model: options.TargetModel = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    remote: options.Remote = None,
    source_remote: options.SourceRemote = None,
    sets: options.Sets = None,
    limit: options.Limit = None,
    context: options.ContextName = Context.auto,
    max_rows: options.MaxRows = None,
    memory: options.Memory = None,
    deduplication: options.Deduplication = True,
    source_sharing: options.SourceSharing = True,
    row_packing: options.RowPacking = True,
    cached_decoding: options.CachedDecoding = True,
    mixed_lengths: options.MixedLengths = True,
    prefix_sharing: options.PrefixSharing = True,
    late_entry: options.LateEntry = True,
    shared_attention: options.SharedAttention = True,
    lean_readout: options.LeanReadout = True,
    early_leaving: options.EarlyLeaving = True,
    memory_reuse: options.MemoryReuse = True,
    json: options.Json = False,
    log_level: options.Level = LogLevel.warning,  # noqa: ARG001 (acted on by its callback)
) -> None:
    """Show what would run, before it runs: contexts, passes, rows and tokens."""
    from patchscope_nn.backends import backend_for
    from patchscope_nn.backends.crossing import traffic
    from patchscope_nn.plan import Optimisations
    from patchscope_nn.runs.execute import plan_prepared
    from patchscope_nn.runs.experiments import PreparedMethods

    used = Optimisations(
        deduplication=deduplication,
        source_sharing=source_sharing,
        row_packing=row_packing,
        cached_decoding=cached_decoding,
        mixed_lengths=mixed_lengths,
        prefix_sharing=prefix_sharing,
        late_entry=late_entry,
        shared_attention=shared_attention,
        lean_readout=lean_readout,
        early_leaving=early_leaving,
        memory_reuse=memory_reuse,
    )
    backend = backend_for(options.remote_value(remote), options.source_remote_value(source_remote))
    prepared = _prepare(
        recipe,
        sets=sets,
        quiet=json,
        limit=limit,
        model=model,
        source_model=source_model,
        target_model=target_model,
        dtype=dtype,
        device_map=device_map,
        remote=options.remote_value(remote),
        source_remote=options.source_remote_value(source_remote),
    )
    methods = prepared.methods if isinstance(prepared, PreparedMethods) else {"": prepared}
    shown = []
    for (name, one), folder in zip(
        methods.items(), _run_folders(prepared, prepared.default_folder), strict=True
    ):
        made = plan_prepared(
            one,
            context=context.value,
            max_rows=max_rows,
            memory=options.memory_value(memory),
            optimisations=used,
            remote=backend.remote,
        )
        shown.append(
            printing.Planned(
                name=name, plan=made, crossing=traffic(made, one.mapping), mapping=one.mapping, folder=folder
            )
        )
    printing.print_plans(shown, as_json=json)


@app.command()
def jobs(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    *,
    json: options.Json = False,
) -> None:
    """List the jobs that a run sent to a server, and how they ended."""
    from patchscope_nn.backends.ndif.job_log import JobLog
    from patchscope_nn.runs.folder import read_manifest

    read_manifest(folder)
    printing.print_jobs(JobLog(folder).jobs(), as_json=json)


@app.command()
def doctor(
    *,
    model: options.Model = None,
    remote: options.Remote = None,
    json: options.Json = False,
) -> None:
    """Is everything in place: versions, models and, with --remote, key, server and a round trip.

    With --model, the proof of the model: what was compared with plain hooks, and what is switched off for it.
    """
    from patchscope_nn.backends import on_server
    from patchscope_nn.models import builtin
    from patchscope_nn.runs.doctor import check_here, check_model, check_server

    findings = list(check_here())
    verdict = None
    where = options.remote_value(remote)
    if on_server(where):
        with printing.waiting("asking the server", quiet=json):
            findings += check_server(where, model or builtin.NAME)
    elif model is not None:
        with printing.waiting("proving the model", quiet=json):
            finding, verdict = check_model(model)
        findings.append(finding)
    printing.print_findings(findings, verdict=verdict, as_json=json)
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


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


def _run_folders(prepared: Any, folder: Path) -> list[Path]:
    """The folder of the run, or of each method's."""
    from patchscope_nn.recipe import slug
    from patchscope_nn.runs.experiments import PreparedMethods

    return (
        [folder / slug(name) for name in prepared.methods]
        if isinstance(prepared, PreparedMethods)
        else [folder]
    )


def _fitted(prepared: Any, *, command: str, quiet: bool) -> Any:
    """What was prepared, with its mappings fitted, where they are still to be."""
    from patchscope_nn.runs.execute import ready
    from patchscope_nn.runs.experiments import PreparedMethods

    if isinstance(prepared, PreparedMethods):
        methods = {name: _fitted(one, command=command, quiet=quiet) for name, one in prepared.methods.items()}
        return replace(prepared, methods=methods)
    if prepared.fit is None or prepared.fit.done:
        return prepared
    progress = printing.Progress(prepared.fit.doing, quiet=quiet, unit=prepared.fit.unit)
    return ready(prepared, command=command, progress=progress, notice=printing.caution)


def _prepare(recipe: str, *, sets: list[str] | None, quiet: bool, **given: Any) -> Any:
    """Read a recipe, and prepare it with the given arguments of `prepare`."""
    from patchscope_nn.recipe import find, load_recipe

    parsed = load_recipe(recipe, sets=sets or ())
    with printing.waiting("loading the model", quiet=quiet):
        from patchscope_nn.runs.experiments import PreparedMethods, prepare

        prepared = prepare(parsed, base=find(recipe).parent, **given)
    ones = prepared.methods.values() if isinstance(prepared, PreparedMethods) else (prepared,)
    for one in ones:
        for said in one.mapping.notices:
            printing.caution(said)
    return prepared
