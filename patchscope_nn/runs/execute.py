"""One execution, from a Patchscope or recipe to a Run.

1. prepare (`prepare.py`): every error that is the user's shows there, before anything is written;
2. plan what is not done yet;
3. run it step by step, and write each step's cells before the next begins;
4. write the table and the report.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from patchscope_nn._util.arguments import checked
from patchscope_nn.backends import (
    Backend,
    Bridged,
    Listener,
    Ndif,
    PassTooLargeError,
    backend_for,
    run_steps,
)
from patchscope_nn.backends.ndif.scheduler import Failed, Scheduler
from patchscope_nn.backends.ndif.client import Patience
from patchscope_nn.backends.ndif.job_log import JobLog
from patchscope_nn.metrics import references
from patchscope_nn.models import ModelInfo, usable_memory
from patchscope_nn.backends.ndif.job_size import JOBS
from patchscope_nn.plan import Context, Optimisations, Plan, packs, plan
from patchscope_nn.runs.prepare import Prepared, prepare, prove_elsewhere
from patchscope_nn.analysis.probes import PROBE_COLUMNS, probe_columns
from patchscope_nn.recipe import Recipe
from patchscope_nn.runs.lazy_rows import Widened
from patchscope_nn.runs.folder import ENSEMBLE, InMemory, Manifest, Run, open_folder
from patchscope_nn.spec import Patchscope
from patchscope_nn.analysis.tables import Tabulator, columns_of

#: What a run's manifest gives the versions of.
_PACKAGES = ("patchscope-nn", "nnsight", "torch", "transformers", "tokenizers", "safetensors")
Progress = Callable[[int, int], None]
#: How many cells' rows are written at a time.
_ROWS_AT_ONCE = 1024


@checked
def run(
    scope: Patchscope | Recipe | str | Path,
    *,
    out: str | Path | None = None,
    remote: bool | str = False,
    source_remote: bool | str | None = None,
    context: Context | Literal["auto"] = "auto",
    max_rows: int | None = None,
    memory: int | None = None,
    optimisations: Optimisations | None = None,
    jobs: int = JOBS,
    progress: Progress | None = None,
    **prepared: Any,
) -> Run:
    """Run a Patchscope or a recipe.

    Args:
        scope: A Patchscope, a recipe, or a recipe's name or file.
        out: The run's folder; the same call again goes on where it was left. None keeps the run in memory.
        remote: Where M* runs. False: in this process; True: on the NDIF that nnsight is configured for; a
            URL: on that one; `local`: in this process, as a rehearsal of a remote run.
        source_remote: Where M runs, in the same words; None is where M* does.
        context: How source and target share a context; `auto` chooses.
        max_rows: The most cells of a forward pass; None is the planner's.
        memory: The most bytes a forward pass may take; None is half of what the target's device has free.
        optimisations: What the planner may do to run less; None is all of it.
        jobs: How many jobs may be on their way to a server at a time.
        progress: Called with (cells done, cells in all) after each step.
        **prepared: `model`, `source_model`, `target_model`, `data`, `controls`, `metrics`, `seed`, `limit`,
            `base`, `dtype` and `device_map`, as in `prepare`.

    Returns:
        The run.

    Raises:
        InputError: Something given is wrong; nothing has been written.
        RunError: The run failed; with a folder, the same call goes on with it.
    """
    return run_prepared(
        prepare(scope, remote=remote, source_remote=source_remote, **prepared),
        out=out,
        remote=remote,
        source_remote=source_remote,
        context=context,
        max_rows=max_rows,
        memory=memory,
        optimisations=optimisations,
        jobs=jobs,
        progress=progress,
    )


@checked
def run_prepared(
    prepared: Prepared,
    *,
    out: str | Path | None = None,
    remote: bool | str = False,
    source_remote: bool | str | None = None,
    context: Context | Literal["auto"] = "auto",
    max_rows: int | None = None,
    memory: int | None = None,
    optimisations: Optimisations | None = None,
    jobs: int = JOBS,
    patience: Patience | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    command: str | None = None,
    listener: Listener | None = None,
) -> Run:
    """Run what `prepare` prepared.

    Arguments as in `run`; `patience` with servers, `notice` of what jobs do, `command` for the manifest, and
    a `listener` that hears what is read and decoded in this process, as it happens.
    """
    backend = backend_for(remote, source_remote)
    prepared = ready(prove_elsewhere(prepared, backend), command=command, notice=notice)
    todo = functools.partial(
        plan_prepared,
        prepared,
        context=context,
        max_rows=max_rows,
        memory=memory,
        optimisations=optimisations,
        remote=backend.remote,
    )
    whole = todo()
    manifest = _manifest(prepared, whole, backend, command)
    started = time.monotonic()
    with _uncollected(), InMemory() if out is None else open_folder(Path(out), manifest) as store:
        before = len(store.done)
        options = _JobOptions(JobLog(store.path), jobs, patience or Patience(), notice, listener)
        # What is on its way is not planned again; without a server nobody would fetch it.
        live = options.job_log.live() if _is_away(backend) else ()
        done = store.done.union(*(job.cells for job in live if job.context != "read"))
        planned = todo(done=done) if done else whole
        for rows in _steps(prepared, planned, backend, store, options):
            store.append(rows)
            if progress:
                progress(len(store.done), len(prepared.sweep.cells))
        found = _with_probe(prepared, store)
        session = _session(backend, cells=len(store.done) - before, elapsed_s=time.monotonic() - started)
        # What is made of the cells may have been asked for since an earlier session.
        now = {name: manifest[name] for name in ("recipe", "references", "columns")}
        manifest = _finished((store.manifest or manifest) | now, session)
        finished = Run(manifest=manifest, rows=found, path=store.path)
        store.finish(finished)
        if (
            store.path is not None
            and prepared.sweep.scope.target.prompts
            and "top_ids" in manifest["columns"]
        ):
            finished.ensemble().to_csv(store.path / ENSEMBLE, index=False)
        if store.path is not None and importlib.util.find_spec("plotly"):
            finished.report()
    return finished


def _with_probe(prepared: Prepared, store: InMemory) -> Sequence[Mapping[str, Any]]:
    """The rows of the finished cells, with what the recipe's probe says of them."""
    rows, asked = store.rows(), prepared.recipe["probe"]
    if asked is None:
        return rows
    said = store.probed(asked)
    if said is None:
        said = probe_columns(
            rows,
            labels=prepared.labels or (),
            prompts=prepared.source_prompts,
            folds=asked["folds"],
            seed=prepared.recipe["seed"],
        )
        store.keep_probed(asked, said)
    return Widened(rows, said)


def ready(
    prepared: Prepared,
    *,
    command: str | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Prepared:
    """Fit or train the mapping, where that is still to be done.

    Args:
        prepared: The run.
        command: The command, for the fit's provenance.
        progress: Called with (done, in all), of what `prepared.fit.unit` says.
        notice: Called with what a researcher should know of the fit.
    """
    if prepared.fit is None:
        return prepared
    mapping = prepared.fit.ready(command=command, progress=progress, notice=notice)
    return replace(prepared, mapping=mapping, fit=None)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector off what is loaded by now; to look it over again and again costs a third."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def plan_prepared(prepared: Prepared, *, memory: int | None = None, **options: Any) -> Plan:
    """Plan what `prepare` prepared; options as in `plan`, but `memory` is what the device leaves to use."""
    if memory is None:
        memory = usable_memory(prepared.target.info)
    return plan(prepared.sweep, memory=memory, **options)


class _JobOptions(NamedTuple):
    """How jobs are kept on their way, and who hears of steps in this process."""

    job_log: JobLog
    width: int
    patience: Patience
    notice: Callable[[str], None] | None
    listener: Listener | None


def _steps(
    prepared: Prepared, planned: Plan, backend: Backend, store: InMemory, options: _JobOptions
) -> Iterator[dict[int, dict[str, Any]]]:
    """Table rows by the number of their cell, some at a time; smaller passes after one that was too large.

    Numbers that are not finite spread through a packed sequence, so such cells run again as rows of a batch.
    """
    tabulate = Tabulator(
        prepared.sweep, prepared.metrics, tokenizer=prepared.target.tokenizer, mapping=prepared.mapping.name
    )
    while True:
        results, n_again = _results(prepared, planned, backend, store, options), 0
        packed = packs(prepared.sweep, planned.optimisations)
        budget, used = planned.budget, planned.optimisations
        try:
            for step in results:
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
        planned = plan(
            prepared.sweep,
            context=planned.context,
            max_rows=budget.max_rows,
            memory=budget.memory,
            done=store.done,
            remote=backend.remote,
            optimisations=used,
        )


def _results(
    prepared: Prepared, planned: Plan, backend: Backend, store: InMemory, options: _JobOptions
) -> Iterator[Any]:
    """The cells with their readouts, a step or a job at a time."""
    if not _is_away(backend):
        return run_steps(
            planned,
            source=prepared.source,
            target=prepared.target,
            mapping=prepared.mapping,
            backend=backend,
            listener=options.listener,
        )
    return Scheduler(
        planned,
        source=prepared.source,
        target=prepared.target,
        mapping=prepared.mapping,
        backend=backend,
        job_log=options.job_log,
        done=store.done,
        width=options.width,
        patience=options.patience,
        notice=options.notice,
    ).results()


def _is_away(backend: Backend) -> TypeGuard[Ndif | Bridged]:
    """Whether M* is on a server, so that steps are jobs."""
    return isinstance(backend.target if isinstance(backend, Bridged) else backend, Ndif)


def _manifest(prepared: Prepared, whole: Plan, backend: Backend, command: str | None) -> Manifest:
    sweep = prepared.sweep
    return {
        "recipe": prepared.recipe,
        "references": references(prepared.metrics, sweep.rows),
        "hash": prepared.digest,
        "data_hash": prepared.data_hash,
        "command": command,
        "created": _now(),
        "state": "running",
        "n_rows": len(sweep.rows),
        **({"n_dropped": prepared.n_dropped} if prepared.n_dropped else {}),
        "n_cells": len(sweep.cells),
        "columns": _columns(prepared),
        "models": {"source": _model(sweep.source), "target": _model(sweep.target)},
        "mapping": {
            "name": prepared.mapping.name,
            "weights": prepared.mapping.digest,
            **({"fit": prepared.mapping.about} if prepared.mapping.about else {}),
            **({"notices": list(prepared.mapping.notices)} if prepared.mapping.notices else {}),
        },
        **({"notices": list(sweep.notices)} if sweep.notices else {}),
        "seed": prepared.recipe["seed"],
        "backend": backend.name,
        "plan": {"digest": whole.digest, "withheld": [str(entry) for entry in whole.withheld]},
        "sessions": [],
        "timings": {"elapsed_s": 0.0},
    }


def _columns(prepared: Prepared) -> list[str]:
    *others, error = columns_of(prepared.sweep.scope.readout, prepared.metrics)
    return [*others, *(PROBE_COLUMNS if prepared.recipe["probe"] else ()), error]


def _finished(manifest: Manifest, session: dict[str, Any]) -> Manifest:
    """The manifest of a run that is done, with the session that ended it."""
    if manifest["state"] == "finished" and not session["cells"]:
        return manifest
    sessions = [*manifest["sessions"], session]
    elapsed = sum(one["elapsed_s"] for one in sessions)
    return {
        **manifest,
        "state": "finished",
        "sessions": sessions,
        "versions": session["versions"],
        "timings": {"elapsed_s": round(elapsed, 3)},
    }


def _session(backend: Backend, *, cells: int, elapsed_s: float) -> dict[str, Any]:
    return {
        "ended": _now(),
        "cells": cells,
        "elapsed_s": round(elapsed_s, 3),
        "backend": backend.name,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in _PACKAGES},
    }


def _model(info: ModelInfo) -> dict[str, Any]:
    left_out = ("architecture", "verdict")
    described = {name: value for name, value in asdict(info).items() if name not in left_out}
    return described | {"proof": "skipped" if info.verdict is None else info.verdict.summary()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
