"""Preparation of runs: models and data are loaded, every cell is resolved. Nothing runs, nothing is written.

All errors in the user's input are raised here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from patchscope_nn.analysis.cell_rows import CELL, KEY
from patchscope_nn.analysis.probes import check_probe
from patchscope_nn.analysis.tables import columns_of
from patchscope_nn.backends import Places
from patchscope_nn.data.given import as_data
from patchscope_nn.data.rows import Table, fingerprint, read_table
from patchscope_nn.errors import DataError, Problem, SpecError, did_you_mean
from patchscope_nn.fitting import Planned, plan_fit, plan_training, same_model
from patchscope_nn.mappings import Pair, ResolvedMapping, resolve_mapping
from patchscope_nn.metrics import (
    check_columns,
    check_metrics,
    check_names,
    parse_column,
    parse_metric,
    resolve_column,
    resolve_metric,
)
from patchscope_nn.models import Model
from patchscope_nn.proof import load
from patchscope_nn.recipe import Recipe, asked_columns, find, load_recipe
from patchscope_nn.runs.loading import Loader, load_models
from patchscope_nn.runs.prepared import Prepared, PreparedRun
from patchscope_nn.runs.shards import Shard
from patchscope_nn.spec import ALIGNED, SITES, Control, Fit, Patchscope, Train
from patchscope_nn.sweep import expand
from patchscope_nn.sweep.vectors import check_vectors

_log = logging.getLogger(__name__)


def prepare(
    scope: Patchscope | Recipe | str | Path,
    *,
    places: Places | None = None,
    data: Any = None,
    controls: Sequence[Control] | None = None,
    columns: Sequence[Any] | None = None,
    metrics: Sequence[Any] | None = None,
    seed: int | None = None,
    limit: int | None = None,
    shard: Any = None,
    base: Path | None = None,
    loader: Loader | None = None,
    **models: Any,
) -> Prepared:
    """Load and resolve everything that a Patchscope, or a recipe with all its methods, needs.

    Args:
        scope: A Patchscope, a recipe, or a recipe's name or file.
        places: Where M and M* run, and how they are loaded; None means in this process.
        data: As in `run`.
        controls: As in `run`.
        columns: As in `run`.
        metrics: As in `run`.
        seed: As in `run`.
        limit: As in `run`.
        shard: As in `run`.
        base: As in `run`.
        loader: Loads a model; None uses `load`.
        **models: `model`, `source_model` and `target_model`, as in `run`.

    Returns:
        The prepared runs. A model that several methods use is loaded once.

    Raises:
        InputError: An argument, the recipe or the data is not valid.
    """
    if isinstance(scope, str | Path):
        base = base or find(scope).parent
        scope = load_recipe(scope)
    recipe = scope if isinstance(scope, Recipe) else _recipe_of(scope)
    methods = _methods(recipe, controls=controls, columns=columns, metrics=metrics, seed=seed)
    # If a row lacks a column of any method, it is dropped for all methods, so that all have the same rows.
    used = {column: field for method in methods.values() for column, field in _used_columns(method).items()}
    prepare_method = partial(
        _prepare_run,
        places=places or Places(),
        data=data,
        limit=limit,
        shard=Shard.of(shard),
        base=base,
        models={**models, "loader": _LoadOnce(loader or load)},
    )
    runs = {
        name: prepare_method(method, used={**used, **_used_columns(method)})
        for name, method in methods.items()
    }
    return Prepared(name=recipe.name, title=recipe.title, runs=runs)


def _recipe_of(scope: Patchscope) -> Recipe:
    """Build a recipe from a Patchscope, whose fields have been checked."""
    fields = {name: getattr(scope, name) for name in Patchscope.model_fields}
    return Recipe.model_construct(name="patchscope", title="A Patchscope", **fields)


def _methods(
    recipe: Recipe,
    *,
    controls: Sequence[Control] | None,
    columns: Sequence[Any] | None,
    metrics: Sequence[Any] | None,
    seed: int | None,
) -> dict[str, Recipe]:
    """Return the recipe of each method, with what the caller chose in place of the recipe's own."""
    changed: dict[str, Any] = {} if controls is None else {"controls": tuple(controls)}
    changed |= {} if seed is None else {"seed": seed}
    return {
        name: method.model_copy(update=changed | _functions(method, columns=columns, metrics=metrics))
        for name, method in (recipe.of_methods() or {recipe.name: recipe}).items()
    }


def _functions(
    recipe: Recipe, *, columns: Sequence[Any] | None, metrics: Sequence[Any] | None
) -> dict[str, Any]:
    """Import the derived columns and the metrics, and check them against the recipe's readout.

    Args:
        recipe: The recipe.
        columns: The caller's columns; None uses the recipe's.
        metrics: The caller's metrics; None uses the recipe's.

    Raises:
        SpecError: A function cannot be imported, or does not fit the readout.
    """
    columns = recipe.columns if columns is None else columns
    metrics = recipe.metrics if metrics is None else metrics
    field = "columns"
    try:
        derived = tuple(resolve_column(parse_column(column)) for column in columns)
        field = "metrics"
        uses = tuple(resolve_metric(parse_metric(metric)) for metric in metrics)
    except ValueError as error:
        raise SpecError([Problem(field=field, message=str(error))]) from None
    problems = check_metrics(uses, recipe.readout)
    problems += check_names(derived, uses, taken=[CELL, KEY, *columns_of(recipe.readout, ())])
    if problems:
        raise SpecError(Problem(field="metrics", message=message) for message in problems)
    return {"columns": derived, "metrics": uses}


def _used_columns(recipe: Recipe) -> dict[str, str]:
    """Return the data columns that a run reads, each with the first field that reads it."""
    uses = asked_columns(recipe, metrics=recipe.metrics, probe=recipe.probe)
    return {column: field for field, column in reversed(list(uses))}


class _LoadOnce:
    """A loader that loads each model once."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._loaded: dict[tuple[Any, ...], tuple[Any, Model]] = {}

    def __call__(self, model: Any, **options: Any) -> Model:
        name = str(model) if isinstance(model, str | Path) else id(model)
        key = (name, repr(sorted(options.items())))
        if key not in self._loaded:
            # The object is kept too, so that its id is not reused.
            self._loaded[key] = model, self._loader(model, **options)
        return self._loaded[key][1]


def _prepare_run(
    recipe: Recipe,
    *,
    places: Places,
    data: Any,
    limit: int | None,
    shard: Shard | None,
    base: Path | None,
    used: Mapping[str, str],
    models: Mapping[str, Any],
) -> PreparedRun:
    """Prepare a single run: a recipe without methods, or one method of a recipe.

    Args:
        recipe: The recipe.
        places: Where M and M* run.
        data: The rows; None uses the recipe's.
        limit: The maximum number of data rows.
        shard: Which part of the cells runs.
        base: The folder that relative data files start from.
        used: The data columns that must have values, each with the field that uses it.
        models: Further arguments of `load_models`.
    """
    rows, dropped = _rows(recipe.data if data is None else data, base=base, limit=limit, used=used)
    if dropped:
        _log.warning("%d data rows were dropped, because a column that is used has no value.", dropped)
    check_columns(recipe.metrics, rows)
    source, target = load_models(recipe, places=places, **models)
    sweep = expand(
        recipe.scope, rows=rows, controls=recipe.controls, source=source, target=target, seed=recipe.seed
    )
    if shard is not None:
        shard.cells(sweep.cells.starts)  # raises an error if there are too many shards
    mapping, fit = _mapping(
        recipe.scope, sweep.cells.pairs, source=source, target=target, places=places, base=base
    )
    # Rows averaged by source.mean keep only the columns that they share.
    check_columns(recipe.metrics, sweep.rows)
    plain_recipe = recipe.model_dump(mode="json", exclude={"methods"}) | {"model": source.info.name}
    prepared = PreparedRun(
        recipe=plain_recipe if data is None else plain_recipe | {"data": None},
        sweep=sweep,
        vectors=check_vectors(sweep),
        source=source,
        target=target,
        places=places,
        mapping=mapping,
        fit=fit,
        columns=recipe.columns,
        metrics=recipe.metrics,
        data_hash=fingerprint(rows),
        n_dropped=dropped,
        shard=shard,
    )
    if recipe.probe:
        _check_label(recipe.probe.label, rows)
        check_probe(prepared.labels or (), prepared.source_prompts, folds=recipe.probe.folds)
    return prepared


def _rows(data: Any, *, base: Path | None, limit: int | None, used: Mapping[str, str]) -> Table:
    if data is None:
        return Table([{}])
    return read_table(as_data(data, limit=limit), base=base, limit=limit, used=used)


def _check_label(label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(rows):
        if label not in row:
            raise DataError(
                f"probe.label={label!r} is not a column of data row {number}.",
                hint=did_you_mean(label, list(row)),
            )


def _mapping(
    scope: Patchscope,
    pairs: tuple[Pair, ...],
    *,
    source: Model,
    target: Model,
    places: Places,
    base: Path | None,
) -> tuple[ResolvedMapping, Planned | None]:
    """Resolve the mapping f, and plan its fit if it is not fitted yet."""
    requested = scope.mapping
    if requested == ALIGNED:
        requested = "identity" if same_model(source, target) else Fit()
    sites = (SITES[scope.source.site].space, SITES[scope.target.site].space)
    if isinstance(requested, Fit | Train):
        spaces: dict[str, Any] = {"source": source, "target": target, "pairs": pairs}
        spaces |= {"sites": sites, "base": base}
        fit: Planned | None
        if isinstance(requested, Fit):
            fit = plan_fit(requested, places=places, **spaces)
        else:
            fit = plan_training(requested, scope=scope, **spaces)
        if fit is not None:
            return fit.mapping(), fit
        requested = "identity"
    mapping = resolve_mapping(requested, source=source.info, target=target.info, pairs=pairs, sites=sites)
    return mapping, None
