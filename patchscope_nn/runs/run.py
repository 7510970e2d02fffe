"""`ps.run`: prepare a Patchscope or a recipe, run each of its methods, and compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

from patchscope_nn._util.arguments import checked
from patchscope_nn.backends import Places
from patchscope_nn.errors import FolderError, InputError
from patchscope_nn.plan import Context, Optimisations
from patchscope_nn.recipe import Recipe
from patchscope_nn.runs.execute import Execution, Progress, execute
from patchscope_nn.runs.experiments import Experiment, save_comparison
from patchscope_nn.runs.manifest import MANIFEST
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.runs.prepared import Prepared
from patchscope_nn.runs.results import Run
from patchscope_nn.runs.reuse import folders_of
from patchscope_nn.spec import Control, Patchscope


class PlaceOptions(TypedDict, total=False):
    """Where the models run, and how they are loaded there; see `run`."""

    remote: bool | str
    source_remote: bool | str | None
    dtype: Any
    device_map: Any
    engine: str | None
    source_engine: str | None
    engine_args: Mapping[str, Any] | None


class ExecutionOptions(TypedDict, total=False):
    """How a run is executed; these options do not change results. See `run`."""

    context: Context | Literal["auto"]
    max_rows: int | None
    memory: int | None
    optimisations: Optimisations | None
    jobs: int
    progress: Callable[[int, int], None] | None
    reuse: Sequence[str | Path]
    report: bool


class RunOptions(PlaceOptions, ExecutionOptions, total=False):
    """What runs, where and how; see `run`."""

    model: Any
    source_model: Any
    target_model: Any
    data: Any
    controls: Sequence[Control] | None
    columns: Sequence[Any] | None
    metrics: Sequence[Any] | None
    seed: int | None
    limit: int | None
    shard: str | tuple[int, int] | None
    base: Path | None


@overload
def run(scope: Patchscope, *, out: str | Path | None = None, **options: Unpack[RunOptions]) -> Run: ...
@overload
def run(
    scope: Recipe | str | Path, *, out: str | Path | None = None, **options: Unpack[RunOptions]
) -> Run | Experiment: ...
@checked
def run(scope: Any, *, out: str | Path | None = None, **options: Unpack[RunOptions]) -> Run | Experiment:
    """Run a Patchscope or a recipe.

    Args:
        scope: A Patchscope, a recipe, or a recipe's name or file.
        out: The run's folder. The same call continues an interrupted run, and a call with more rows, layers,
            positions or controls computes what is missing. None keeps everything in memory.
        **options: What runs, where and how:

            model: The model, in any form that `load` takes; None uses the recipe's, or the builtin model.
            source_model: M, if it is not `model`.
            target_model: M*, if it is not M.
            data: Rows (mappings of columns to values), a pandas DataFrame, a `datasets.Dataset`, a function
                that returns rows, or a mapping like a recipe's `data`; None uses the recipe's, or a single
                row without columns.
            controls: Names of controls; None uses the recipe's.
            columns: Functions of (columns, row) that derive columns, or their names; None uses the recipe's.
            metrics: Metrics as in a recipe, or functions of (columns, row); None uses the recipe's.
            seed: The seed for random states, shuffled rows and sampling; None uses the recipe's, or 0.
            limit: The maximum number of data rows.
            shard: Which part of the cells runs, `"3/16"` or `(3, 16)`; None runs all. `merge` joins shards.
            base: The folder that relative data files start from; None uses the recipe's, or the current one.
            remote: Where M* runs. False: in this process; True: on the NDIF that nnsight is configured for; a
                URL: on that server, of NDIF or, as `vllm+http://host:port`, of `patchscope serve`; `local`:
                in this process, as a rehearsal of a remote run.
            source_remote: Where M runs, in the same form; None means where M* runs.
            dtype: The dtype of models given by name, as in `load`.
            device_map: Their devices, as in `load`.
            engine: The engine of M*: `transformers` (the default) or `vllm`.
            source_engine: The engine of M; None means that of M*, if M runs in the same place.
            engine_args: The arguments of the engine vllm, for example `{"tensor_parallel_size": 4}`.
            context: How source and target share a context; `auto` chooses.
            max_rows: The maximum number of cells in a forward pass; None uses the planner's.
            memory: The maximum bytes of a forward pass; None uses half of the free memory of the target's
                device.
            optimisations: The optimisations that the planner may use; None allows all.
            jobs: The maximum number of unfinished jobs on a server.
            progress: Called with (cells done, total cells) after each step.
            reuse: Folders of other runs, whose finished cells are taken instead of computed.
            report: Whether to write the report of a run with a folder; `Run.report` writes it later.

    Returns:
        The run. For a recipe with several methods, an experiment: a mapping from method names to runs.

    Raises:
        InputError: An argument, the recipe or the data is not valid; nothing has been written.
        RunError: The run failed; if it has a folder, the same call continues it.
    """
    if not isinstance(scope, Patchscope | Recipe | str | Path):
        raise InputError(
            f"a {type(scope).__name__} cannot be run.",
            hint="Give a Patchscope, a Recipe, or the name or file of a recipe; a mapping becomes a recipe "
            "by ps.Recipe(**mapping).",
        )
    remaining: dict[str, Any] = {**options}
    places = Places.of(**_pop_options(remaining, PlaceOptions))
    executing = _pop_options(remaining, ExecutionOptions)
    execution = Execution(**executing | {"reuse": tuple(map(Path, executing.get("reuse", ())))})
    return run_prepared(prepare(scope, places=places, **remaining), execution, out=out)


def _pop_options(options: dict[str, Any], kind: type[PlaceOptions | ExecutionOptions]) -> dict[str, Any]:
    """Remove the options of one kind from `options`, and return them."""
    return {name: options.pop(name) for name in kind.__annotations__ if name in options}


def run_prepared(
    prepared: Prepared, execution: Execution | None = None, *, out: str | Path | None = None
) -> Run | Experiment:
    """Run what `prepare` returned. If there are several methods, compare them.

    Args:
        prepared: The run, or the methods of an experiment.
        execution: How they run; None uses the defaults.
        out: As in `run`.

    Returns:
        As in `run`.

    Raises:
        RunError: As in `run`.
    """
    folder = None if out is None else Path(out)
    if folder is not None and not prepared.is_single and (folder / MANIFEST).exists():
        raise FolderError(f"{folder} holds a run.", hint="Give another --out: a folder for all methods.")
    runs = run_each(prepared, execution, folder=folder)
    if prepared.is_single:
        return next(iter(runs.values()))
    experiment = Experiment(title=prepared.title, runs=runs, path=folder)
    if folder is not None:
        save_comparison(experiment, folder, report=execution is None or execution.report)
    return experiment


def run_each(
    prepared: Prepared, execution: Execution | None = None, *, folder: Path | None = None
) -> dict[str, Run]:
    """Run the prepared methods one after the other; the arguments are as in `run_prepared`."""
    execution = execution or Execution()
    folders = {} if folder is None else prepared.folders(folder)
    n_before, n_cells = 0, sum(len(method.cells) for method in prepared.runs.values())
    runs: dict[str, Run] = {}
    for name, method in prepared.runs.items():
        progress = _progress_of_all(execution.progress, n_before=n_before, n_cells=n_cells)
        reuse = execution.reuse
        if not prepared.is_single:
            reuse = folders_of(name, reuse, methods=[*prepared.runs])
        here = replace(execution, progress=progress, reuse=reuse)
        runs[name] = execute(method, here, out=folders.get(name))
        n_before += len(method.cells)
    return runs


def _progress_of_all(progress: Progress | None, *, n_before: int, n_cells: int) -> Progress | None:
    """Return a progress callback for one method that counts the cells of all methods."""
    return None if progress is None else lambda done, _: progress(n_before + done, n_cells)
