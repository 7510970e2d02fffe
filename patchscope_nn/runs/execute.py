"""A prepared run, executed step by step.

1. fit the mapping and prove models that are on servers, where that is still to be done;
2. plan the cells that are not finished yet;
3. run the plan, and write each step's cells before the next step begins;
4. write the table and the report.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

from patchscope_nn.analysis.probes import probe_columns
from patchscope_nn.analysis.tables import Tabulator
from patchscope_nn.backends import Backend, Bridged, Listener, Ndif, PassTooLargeError, run_steps
from patchscope_nn.backends.ndif.client import Patience
from patchscope_nn.backends.ndif.job_log import JobLog
from patchscope_nn.backends.ndif.job_size import JOBS
from patchscope_nn.backends.ndif.scheduler import Failed, Scheduler
from patchscope_nn.models import usable_memory
from patchscope_nn.plan import Context, Optimisations, Plan, packs, plan
from patchscope_nn.runs.folder import ENSEMBLE, InMemory, open_folder
from patchscope_nn.runs.lazy_rows import Widened
from patchscope_nn.runs.loading import prove_on_servers
from patchscope_nn.runs.manifest import finished_manifest, new_manifest, new_session
from patchscope_nn.runs.prepared import PreparedRun
from patchscope_nn.runs.results import Run

#: Called with (done, in all).
Progress: TypeAlias = Callable[[int, int], None]
#: How many cells' rows are written at a time.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is planned and executed. None of it changes a result.

    Attributes:
        context: How source and target share a context; `auto` chooses.
        max_rows: The most cells of a forward pass; None is the planner's.
        memory: The most bytes a forward pass may take; None is half of what the target's device has free.
        optimisations: What the planner may do to run less; None is all of it.
        jobs: How many jobs may be on their way to a server at a time.
        patience: How long servers are waited for.
        progress: Called with (cells done, cells in all) after each step.
        notice: Called with a line about what jobs or fits do.
        command: The command, for the manifest and a fit's provenance.
        listener: Hears what is read and decoded in this process, as it happens.
    """

    context: Context | Literal["auto"] = "auto"
    max_rows: int | None = None
    memory: int | None = None
    optimisations: Optimisations | None = None
    jobs: int = JOBS
    patience: Patience = field(default_factory=Patience)
    progress: Progress | None = None
    notice: Callable[[str], None] | None = None
    command: str | None = None
    listener: Listener | None = None


def plan_run(
    prepared: PreparedRun, execution: Execution | None = None, *, done: Collection[int] = ()
) -> Plan:
    """Plan a prepared run.

    Args:
        prepared: The run.
        execution: How it will run; None is the default.
        done: The numbers of the cells that are finished.

    Raises:
        InputError: The context cannot serve these cells, or a budget is below 1.
    """
    how = execution or Execution()
    return plan(
        prepared.sweep,
        context=how.context,
        max_rows=how.max_rows,
        memory=usable_memory(prepared.target.info) if how.memory is None else how.memory,
        done=done,
        remote=prepared.places.backend.remote,
        optimisations=how.optimisations,
    )


def fit_first(
    prepared: PreparedRun,
    *,
    command: str | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> PreparedRun:
    """Fit or train the mapping, where that is still to be done.

    Args:
        prepared: The run.
        command: The command, for the fit's provenance.
        progress: Called with (done, in all), of what `prepared.fit.unit` says.
        notice: Called with what a researcher should know of the fit.

    Returns:
        The run with its mapping.
    """
    if prepared.fit is None:
        return prepared
    mapping = prepared.fit.ready(command=command, progress=progress, notice=notice)
    return replace(prepared, mapping=mapping, fit=None)


def execute(prepared: PreparedRun, execution: Execution, *, out: Path | None = None) -> Run:
    """Run what was prepared, and write its folder.

    Args:
        prepared: The run.
        execution: How it runs.
        out: The folder; a run that was begun there is continued. None keeps the run in memory.

    Returns:
        The finished run.

    Raises:
        FolderError: The folder holds another run, or another process writes it.
        RunError: The run failed; what is finished is kept in the folder.
    """
    prepared = fit_first(_proven(prepared), command=execution.command, notice=execution.notice)
    backend, whole = prepared.places.backend, plan_run(prepared, execution)
    manifest = new_manifest(prepared, whole, command=execution.command)
    started = time.monotonic()
    with _uncollected(), InMemory() if out is None else open_folder(out, manifest) as store:
        n_before = len(store.done)
        for rows in _unfinished(prepared, whole, store, execution):
            store.append(rows)
            if execution.progress:
                execution.progress(len(store.done), len(prepared.sweep.cells))
        n_cells, elapsed_s = len(store.done) - n_before, time.monotonic() - started
        # What is made of finished cells may have been asked for since an earlier session.
        asked = {name: manifest[name] for name in ("recipe", "references", "columns", "metrics")}
        manifest = finished_manifest(
            (store.manifest or manifest) | asked, new_session(backend, n_cells=n_cells, elapsed_s=elapsed_s)
        )
        run = Run(manifest=manifest, rows=_with_probe(prepared, store), path=store.path)
        store.finish(run.rows, manifest)
        if run.path is not None:
            _write_ensemble_and_report(run)
    return run


def _proven(prepared: PreparedRun) -> PreparedRun:
    """The run, whose planner knows what the proofs of models on servers found."""
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


def _with_probe(prepared: PreparedRun, store: InMemory) -> Sequence[Mapping[str, Any]]:
    """The rows of the finished cells, with the columns of the recipe's probe."""
    rows, probe = store.rows(), prepared.recipe["probe"]
    if probe is None:
        return rows
    columns = store.probe_columns(probe)
    if columns is None:
        columns = probe_columns(
            rows,
            labels=prepared.labels or (),
            prompts=prepared.source_prompts,
            folds=probe["folds"],
            seed=prepared.recipe["seed"],
        )
        store.keep_probe_columns(probe, columns)
    return Widened(rows, columns)


def _write_ensemble_and_report(run: Run) -> None:
    folder = Path(run.path or ".")
    if run.manifest["recipe"]["target"]["prompts"] and "top_ids" in run.manifest["columns"]:
        run.ensemble().to_csv(folder / ENSEMBLE, index=False)
    if importlib.util.find_spec("plotly"):
        run.report()


def _unfinished(
    prepared: PreparedRun, whole: Plan, store: InMemory, execution: Execution
) -> Iterator[dict[int, dict[str, Any]]]:
    """Run the cells that are not finished yet, and give table rows by cell number, some at a time.

    Passes are halved after one that was too large. Numbers that are not finite spread through a packed
    sequence, so such cells run again as rows of a batch.
    """
    job_log = JobLog(store.path)
    # Cells of jobs on their way are not planned again; without a server nobody would fetch them.
    live = job_log.live() if _on_server(prepared.places.backend) else ()
    done = store.done.union(*(job.cells for job in live if job.context != "read"))
    planned = plan_run(prepared, execution, done=done) if done else whole
    tabulate = Tabulator(
        prepared.sweep,
        prepared.metrics,
        tokenizer=prepared.target.tokenizer,
        mapping=prepared.mapping.name,
        derived=prepared.columns,
    )
    while True:
        n_again, budget, used = 0, planned.budget, planned.optimisations
        packed = packs(prepared.sweep, used)
        try:
            for step in _results(prepared, planned, store, execution, job_log):
                # A step may run for many more cells than it holds.
                while some := list(islice(step, _ROWS_AT_ONCE)):
                    rows = {
                        cell.number: tabulate.failed(cell, raw.reason)
                        if isinstance(raw, Failed)
                        else tabulate.row(cell, raw)
                        for cell, raw in some
                        if isinstance(raw, Failed) or not (packed and "not_finite" in raw)
                    }
                    n_again += len(some) - len(rows)
                    yield rows
        except PassTooLargeError as error:
            if error.rows == 1:
                raise
            budget = budget.halved(error.rows)
        else:
            if not n_again:
                return
            used = replace(used, prefix_sharing=False, late_entry=False)
        smaller = replace(
            execution,
            context=planned.context,
            max_rows=budget.max_rows,
            memory=budget.memory,
            optimisations=used,
        )
        planned = plan_run(prepared, smaller, done=store.done)


def _results(
    prepared: PreparedRun, planned: Plan, store: InMemory, execution: Execution, job_log: JobLog
) -> Iterator[Any]:
    """The cells with their readouts, a step or a job at a time."""
    backend = prepared.places.backend
    models = {"source": prepared.source, "target": prepared.target}
    if not _on_server(backend):
        return run_steps(
            planned, **models, mapping=prepared.mapping, backend=backend, listener=execution.listener
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


def _on_server(backend: Backend) -> TypeGuard[Ndif | Bridged]:
    """True if the target model runs on a server, where each plan step becomes a job."""
    return isinstance(backend.target if isinstance(backend, Bridged) else backend, Ndif)
