"""Execution of a prepared run, step by step.

1. Fit the mapping, and prove models on servers, unless this has been done before.
2. Plan the cells that are not finished yet.
3. Run the plan. While a step runs, a second thread prepares the next one, and writes the cells of the
   previous one.
4. Write the table and the report.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

import numpy as np

from patchscope_nn._util.ragged import Ints
from patchscope_nn.analysis.cell_rows import CellRows
from patchscope_nn.analysis.probes import probe_columns
from patchscope_nn.analysis.tabulate import Tabulator
from patchscope_nn.backends import Backend, Bridged, Listener, PassTooLargeError, Server, run_steps
from patchscope_nn.backends.jobs.client import Patience
from patchscope_nn.backends.jobs.job_log import JobLog
from patchscope_nn.backends.jobs.job_size import JOBS
from patchscope_nn.backends.jobs.scheduler import Scheduler
from patchscope_nn.models import usable_memory
from patchscope_nn.plan import Context, Optimisations, Plan, packs, plan
from patchscope_nn.runs.folder import ENSEMBLE, InMemory, open_folder
from patchscope_nn.runs.loading import prove_on_servers
from patchscope_nn.runs.manifest import finished_manifest, new_manifest, new_session
from patchscope_nn.runs.overlap import Writer, behind, second_thread
from patchscope_nn.runs.prepared import PreparedRun
from patchscope_nn.runs.results import Run
from patchscope_nn.runs.reuse import take_cells

#: Called with (done, total).
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is planned and executed. These options do not change results.

    Attributes:
        context: How source and target share a context; `auto` chooses.
        max_rows: The maximum number of cells in a forward pass; None uses the planner's.
        memory: The maximum bytes of a forward pass; None uses half of the free memory of the target's device.
        optimisations: The optimisations that the planner may use; None allows all.
        jobs: The maximum number of unfinished jobs on a server.
        patience: How long to wait for servers.
        progress: Called with (cells done, total cells) after each step.
        notice: Called with a line of text about jobs or fits.
        report: True to write the report of a run that has a folder.
        command: The command line, for the manifest and a fit's provenance.
        listener: Receives states and tokens while steps run in this process.
        reuse: The folders of other runs, whose finished cells are taken instead of computed.
    """

    context: Context | Literal["auto"] = "auto"
    max_rows: int | None = None
    memory: int | None = None
    optimisations: Optimisations | None = None
    jobs: int = JOBS
    patience: Patience = field(default_factory=Patience)
    progress: Progress | None = None
    notice: Callable[[str], None] | None = None
    report: bool = True
    command: str | None = None
    listener: Listener | None = None
    reuse: tuple[Path, ...] = ()


def plan_run(prepared: PreparedRun, execution: Execution | None = None, *, done: Ints | None = None) -> Plan:
    """Plan a prepared run.

    Args:
        prepared: The run.
        execution: How it will run; None uses the defaults.
        done: The numbers of the finished cells; None for none. Cells of other shards are never planned.

    Raises:
        InputError: The cells cannot run in this context, or a limit is below 1.
    """
    execution = execution or Execution()
    memory = usable_memory(prepared.target.info) if execution.memory is None else execution.memory
    left_out = np.ones(len(prepared.sweep.cells), bool)
    left_out[prepared.cells.start : prepared.cells.stop] = False
    left_out[np.empty(0, np.int64) if done is None else done] = True
    return plan(
        prepared.sweep,
        context=execution.context,
        max_rows=execution.max_rows,
        memory=memory,
        done=np.flatnonzero(left_out),
        remote=prepared.places.backend.remote,
        optimisations=execution.optimisations,
    )


def fit_first(
    prepared: PreparedRun,
    *,
    command: str | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> PreparedRun:
    """Fit or train the mapping, unless this has been done before.

    Args:
        prepared: The run.
        command: The command line, for the fit's provenance.
        progress: Called with (done, total), counted in `prepared.fit.unit`.
        notice: Called with a line of text about the fit that a researcher should know.

    Returns:
        The run with its mapping.
    """
    if prepared.fit is None:
        return prepared
    mapping = prepared.fit.ready(command=command, progress=progress, notice=notice)
    return replace(prepared, mapping=mapping, fit=None)


def execute(prepared: PreparedRun, execution: Execution, *, out: Path | None = None) -> Run:
    """Execute a prepared run, and write its folder.

    Args:
        prepared: The run.
        execution: How it runs.
        out: The folder; an unfinished run in it is continued. None keeps the run in memory.

    Returns:
        The finished run.

    Raises:
        FolderError: The folder holds another run, or another process writes it.
        RunError: The run failed; finished cells are kept in the folder.
    """
    prepared = fit_first(_proven(prepared), command=execution.command, notice=execution.notice)
    backend, full_plan = prepared.places.backend, plan_run(prepared, execution)
    manifest = new_manifest(prepared, full_plan, command=execution.command)
    started = time.monotonic()
    with (
        _uncollected(),
        InMemory(prepared) if out is None else open_folder(out, manifest, prepared) as store,
        second_thread(wanted=full_plan.optimisations.overlap and _may_overlap(prepared)) as thread,
    ):
        if thread is not None and store.path is not None and execution.report:
            thread.submit(_load_report)
        taken = take_cells(execution.reuse, prepared, store)
        n_before = store.n_done
        for _ in _unfinished(prepared, full_plan, store, execution, thread):
            if execution.progress:
                execution.progress(store.n_done, store.n_cells)
        n_cells, elapsed_s = store.n_done - n_before, time.monotonic() - started
        # A probe or summary may have been added to the recipe since an earlier session.
        current = {name: manifest[name] for name in ("recipe", "references", "columns", "metrics")}
        manifest = finished_manifest(
            (store.manifest or manifest) | current,
            new_session(backend, n_cells=n_cells, elapsed_s=elapsed_s, taken=taken),
        )
        probe, wanted = prepared.recipe["probe"], prepared.labels is not None and prepared.shard is None
        rows = with_probe(
            store.rows(),
            prepared.recipe,
            {"labels": prepared.labels, "prompts": prepared.source_prompts} if wanted else None,
            keep=partial(store.keep_probe_columns, probe),
            kept=store.probe_columns(probe),
        )
        run = Run(manifest=manifest, rows=rows, path=store.path)
        store.finish(run.rows, manifest)
        if run.path is not None:
            write_ensemble_and_report(run, report=execution.report)
    return run


def _may_overlap(prepared: PreparedRun) -> bool:
    """True if the host's work may be done in a second thread while a step runs in this process.

    A user's metric or column may run a model, which must not happen while a step traces it.
    """
    return not (prepared.places.backend.remote or prepared.columns or prepared.own_functions)


def _proven(prepared: PreparedRun) -> PreparedRun:
    """Prove models on servers, so that the planner knows the verdicts."""
    source, target = prove_on_servers(prepared.source, prepared.target, prepared.places)
    if source is prepared.source and target is prepared.target:
        return prepared
    sweep = replace(prepared.sweep, source=source.info, target=target.info)
    return replace(prepared, source=source, target=target, sweep=sweep)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Exclude loaded objects from garbage collection; rescanning them costs a third of the run time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def with_probe(
    rows: CellRows,
    recipe: Mapping[str, Any],
    probed: Mapping[str, Any] | None,
    *,
    keep: Callable[[Mapping[str, Sequence[Any]]], None],
    kept: Mapping[str, Sequence[Any]] | None = None,
) -> CellRows:
    """Return rows with the columns of the recipe's probe.

    Args:
        rows: The rows.
        recipe: The recipe.
        probed: The `labels` and `prompts` of the data rows; None if there is no probe to train.
        keep: Called with the columns if the probe is trained now.
        kept: The columns, if it has been trained before.
    """
    if probed is None:
        return rows
    if kept is None:
        kept = probe_columns(rows, **probed, folds=recipe["probe"]["folds"], seed=recipe["seed"])
        keep(kept)
    return rows.with_columns(kept)


def write_ensemble_and_report(run: Run, *, report: bool) -> None:
    """Write what a finished run's folder has besides its table: a combined ensemble, and the report."""
    folder = Path(run.path or ".")
    if run.manifest["recipe"]["target"]["prompts"] and "top_ids" in run.manifest["columns"]:
        run.ensemble().to_csv(folder / ENSEMBLE, index=False)
    if report and importlib.util.find_spec("plotly"):
        run.report()


def _load_report() -> None:
    """Import and compile what the report needs, while the first step runs."""
    from patchscope_nn.report.page import template

    template("report.html.jinja")


def _unfinished(
    prepared: PreparedRun, full_plan: Plan, store: InMemory, execution: Execution, thread: Executor | None
) -> Iterator[None]:
    """Run and store the unfinished cells; yields each time that cells have been stored.

    If a pass is too large, passes are halved. In a packed sequence, values that are not finite spread to
    other cells, so the affected cells run again as rows of a batch.
    """
    job_log = JobLog(store.path, prepared.index)
    # Cells of unfinished jobs are not planned again, unless this run has no server to fetch them from.
    live = job_log.live() if _on_server(prepared.places.backend) else ()
    done = store.done.copy()
    done[[number for job in live if job.context != "read" for number in job.cells]] = True
    planned = plan_run(prepared, execution, done=np.flatnonzero(done)) if done.any() else full_plan
    tabulate = Tabulator(
        prepared.sweep,
        prepared.metrics,
        tokenizer=prepared.target.tokenizer,
        mapping=prepared.mapping.name,
        derived=prepared.columns,
    )
    while True:
        budget, used = planned.budget, planned.optimisations
        writer = Writer(store, tabulate, packed=packs(prepared.sweep, used))
        try:
            steps = _results(prepared, planned, store, execution, job_log=job_log, thread=thread)
            yield from behind((partial(writer.write, step) for step in steps), thread)
        except PassTooLargeError as error:
            if error.rows == 1:
                raise
            budget = budget.halved(error.rows)
        else:
            if not writer.n_again:
                return
            used = replace(used, prefix_sharing=False, late_entry=False)
        smaller = replace(
            execution,
            context=planned.context,
            max_rows=budget.max_rows,
            memory=budget.memory,
            optimisations=used,
        )
        planned = plan_run(prepared, smaller, done=np.flatnonzero(store.done))


def _results(
    prepared: PreparedRun,
    planned: Plan,
    store: InMemory,
    execution: Execution,
    *,
    job_log: JobLog,
    thread: Executor | None,
) -> Iterator[Any]:
    """Return an iterator of steps or jobs, each an iterator of cells with their raw readouts."""
    backend = prepared.places.backend
    models = {"source": prepared.source, "target": prepared.target}
    if not _on_server(backend):
        return run_steps(
            planned,
            **models,
            mapping=prepared.mapping,
            backend=backend,
            listener=execution.listener,
            thread=thread,
        )
    return Scheduler(
        planned,
        **models,
        mapping=prepared.mapping,
        backend=backend,
        job_log=job_log,
        done=store.done,
        width=execution.jobs,
        patience=execution.patience,
        notice=execution.notice,
    ).results()


def _on_server(backend: Backend) -> TypeGuard[Server | Bridged]:
    """True if the target model runs on a server, where each plan step becomes a job."""
    return isinstance(backend.target if isinstance(backend, Bridged) else backend, Server)
