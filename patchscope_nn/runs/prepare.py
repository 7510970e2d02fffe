"""Preparing a run: models and data loaded, every cell resolved. Nothing runs and nothing is written.

Every error that is the user's to mend shows here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from patchscope_nn.models import builtin
from patchscope_nn._util.arguments import checked
from patchscope_nn.backends import Backend, Bridged, Ndif, on_server
from patchscope_nn.sweep import Sweep, expand
from patchscope_nn.data.rows import Table, fingerprint, read_table
from patchscope_nn.data.given import as_data
from patchscope_nn.errors import DataError, InputError, Problem, SpecError, did_you_mean
from patchscope_nn.fitting import Planned, plan_fit, plan_training, same_model
from patchscope_nn.mappings import Pair, ResolvedMapping, resolve_mapping
from patchscope_nn.metrics import MetricUse, check_columns, check_metrics, parse_metric
from patchscope_nn.models import Model, common_base, wear, wear_named
from patchscope_nn.analysis.probes import check_probe
from patchscope_nn.proof import load, proven, proven_on
from patchscope_nn.recipe import Recipe, asked_columns, find, load_recipe
from patchscope_nn.spec import ALIGNED, SITES, Control, Fit, Patchscope, Train
from patchscope_nn.sweep.vectors import check_vectors

#: False: this process; `local`: the rehearsal; True: the NDIF that nnsight is configured for; or a URL.
Where: TypeAlias = bool | str | None
Loader: TypeAlias = Callable[..., Model]
_log = logging.getLogger(__name__)

#: Fields of a recipe that decide what is made of the cells, and not what they are.
_AFTERWARDS = ("best_over", "probe", "score")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a run needs, resolved and checked; nothing has run yet.

    Attributes:
        recipe: What is asked, as a plain mapping with all defaults.
        sweep: The cells.
        source: M.
        target: M*.
        mapping: f.
        metrics: What is computed of each cell.
        data_hash: Hex digest of the data rows.
        vectors: Hex digest of the files that vectors come from; empty where there are none.
        fit: How the mapping is fitted or trained before the run, where it is.
        n_dropped: How many data rows were left out, because a column that is used is missing there.
    """

    recipe: Mapping[str, Any]
    sweep: Sweep
    source: Model
    target: Model
    mapping: ResolvedMapping
    metrics: tuple[MetricUse, ...]
    data_hash: str
    vectors: str = ""
    fit: Planned | None = None
    n_dropped: int = 0

    @property
    def digest(self) -> str:
        """Hex digest of what decides the results: recipe, data, models, mapping; not how they are run.

        What is made of finished cells is left out, so that another probe or summary goes on with them.
        """
        models = [(one.name, one.revision, one.dtype) for one in (self.sweep.source, self.sweep.target)]
        asked = {name: value for name, value in self.recipe.items() if name not in _AFTERWARDS}
        said = [asked, self.data_hash, models, self.mapping.name, self.mapping.digest, self.vectors]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def labels(self) -> list[str] | None:
        """The class of each data row, where the recipe has a probe."""
        asked = self.recipe["probe"]
        return None if asked is None else [str(row[asked["label"]]) for row in self.sweep.rows]

    @property
    def source_prompts(self) -> list[str]:
        """The source prompt of each data row."""
        found: dict[int, str] = {}
        for entry in self.sweep.entries:
            found.setdefault(entry.row, self.sweep.source_text(entry.source))
        return list(found.values())

    @property
    def default_folder(self) -> Path:
        """`runs/NAME-HASH`: the same command finds the same folder."""
        return Path("runs") / f"{self.recipe['name']}-{self.digest[:8]}"


@checked
def prepare(
    scope: Patchscope | Recipe | str | Path,
    *,
    model: Any = None,
    source_model: Any = None,
    target_model: Any = None,
    data: Any = None,
    controls: Sequence[Control] | None = None,
    metrics: Sequence[Any] | None = None,
    seed: int | None = None,
    limit: int | None = None,
    base: Path | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    remote: Where = False,
    source_remote: Where = None,
    loader: Loader = load,
    also_used: Mapping[str, str] = {},
) -> Prepared:
    """Load and resolve what a run needs, and write nothing.

    Args:
        scope: A Patchscope, a recipe, or a recipe's name or file.
        model: What `models.load` takes; None takes the recipe's, or the builtin model.
        source_model: M, where it is not `model`.
        target_model: M*, where it is not M.
        data: Rows (mappings of columns to values), a pandas DataFrame, a `datasets.Dataset`, or a mapping as
            a recipe's `data`; None takes the recipe's, or a single row without columns.
        controls: Names of controls; None takes the recipe's.
        metrics: Metrics as in a recipe; None takes the recipe's.
        seed: The seed of random states, other rows and sampling; None takes the recipe's, or 0.
        limit: The most data rows.
        base: The folder that relative data files start from; None is the recipe's, or the current one.
        dtype: How models that are named are loaded, as in `models.load`.
        device_map: The same.
        remote: Where M* runs, and M; of a model that runs on a server only config and tokenizer are loaded.
        source_remote: Where M runs; None is where M* does.
        loader: What loads a model, as `models.load` does.
        also_used: Data columns that may not be missing either, each with the field that uses it: those of
            other methods that this run is compared with, so that all have the same rows.

    Returns:
        The run, prepared.

    Raises:
        InputError: Something given is wrong.
    """
    if isinstance(scope, str | Path):
        base = base or find(scope).parent
        scope = load_recipe(scope)
    recipe = scope if isinstance(scope, Recipe) else None
    if recipe and recipe.methods:
        raise InputError(
            f"the recipe {recipe.name} holds several methods, which are several runs.",
            hint="Run it with ps.run(recipe), or prepare one of recipe.of_methods().",
        )
    patchscope = scope.scope if isinstance(scope, Recipe) else scope
    uses = recipe.metrics if recipe and metrics is None else _metrics(metrics or (), patchscope)
    used = {**also_used, **used_columns(scope, metrics=uses)}
    rows, dropped = _rows(recipe.data if recipe and data is None else data, base=base, limit=limit, used=used)
    if dropped:
        _log.warning("%d data rows were left out: a column that is used is missing there.", dropped)
    check_columns(uses, rows)
    chosen = tuple(recipe.controls if recipe and controls is None else controls or ())
    seed = (recipe.seed if recipe else 0) if seed is None else seed
    source, target = load_models(
        scope,
        model=model,
        source_model=source_model,
        target_model=target_model,
        dtype=dtype,
        device_map=device_map,
        remote=remote,
        source_remote=source_remote,
        loader=loader,
    )
    asked = {
        "name": recipe.name if recipe else "patchscope",
        "title": recipe.title if recipe else "A Patchscope",
        "paper": recipe.paper if recipe else None,
        "model": source.info.name,
        "data": recipe.model_dump(mode="json")["data"] if recipe and data is None else None,
        **patchscope.model_dump(mode="json"),
        "metrics": [use.dump() for use in uses],
        "controls": list(chosen),
        "seed": seed,
        "best_over": list(recipe.best_over) if recipe else [],
        "probe": recipe.probe.model_dump() if recipe and recipe.probe else None,
        "score": recipe.score if recipe else None,
    }
    sweep = expand(patchscope, rows=rows, controls=chosen, source=source, target=target, seed=seed)
    mapping, fit = _mapping(
        patchscope,
        sweep.cells.pairs,
        source=source,
        target=target,
        remote=remote,
        source_remote=source_remote,
        base=base,
    )
    # Rows that source.mean averages keep the columns they share.
    check_columns(uses, sweep.rows)
    prepared = Prepared(
        recipe=asked,
        sweep=sweep,
        vectors=check_vectors(sweep),
        source=source,
        target=target,
        mapping=mapping,
        fit=fit,
        metrics=uses,
        data_hash=fingerprint(rows),
        n_dropped=dropped,
    )
    if recipe and recipe.probe:
        _check_label(recipe.probe.label, rows)
        check_probe(prepared.labels or (), prepared.source_prompts, folds=recipe.probe.folds)
    return prepared


def _check_label(label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(rows):
        if label not in row:
            raise DataError(
                f"probe.label={label!r} is no column of data row {number}.",
                hint=did_you_mean(label, list(row)),
            )


def _mapping(
    scope: Patchscope,
    pairs: tuple[Pair, ...],
    *,
    source: Model,
    target: Model,
    base: Path | None,
    **where: Any,
) -> tuple[ResolvedMapping, Planned | None]:
    """f, and how it is fitted where that is still to be done."""
    asked = scope.mapping
    if asked == ALIGNED:
        asked = "identity" if same_model(source, target) else Fit()
    read, written = (SITES[side.site].space for side in (scope.source, scope.target))
    if isinstance(asked, Fit | Train):
        places: dict[str, Any] = {"source": source, "target": target, "pairs": pairs}
        places |= {"sites": (read, written), "base": base}
        fit: Planned | None
        if isinstance(asked, Fit):
            fit = plan_fit(asked, **places, **where)
        else:
            fit = plan_training(asked, scope=scope, **places)
        if fit is not None:
            return fit.mapping(), fit
        asked = "identity"
    found = resolve_mapping(asked, source=source.info, target=target.info, pairs=pairs, sites=(read, written))
    return found, None


def _metrics(given: Sequence[Any], scope: Patchscope) -> tuple[MetricUse, ...]:
    try:
        uses = tuple(parse_metric(one) for one in given)
    except ValueError as error:
        raise SpecError([Problem(field="metrics", message=str(error))]) from None
    if found := check_metrics(uses, scope.readout):
        raise SpecError(Problem(field="metrics", message=message) for message in found)
    return uses


def used_columns(scope: Patchscope | Recipe, *, metrics: Sequence[MetricUse] | None = None) -> dict[str, str]:
    """The data columns that a run reads, each with the first field that does; None is a recipe's metrics."""
    recipe = scope if isinstance(scope, Recipe) else None
    uses = (recipe.metrics if recipe else ()) if metrics is None else metrics
    asked = asked_columns(scope, metrics=uses, probe=recipe.probe if recipe else None)
    return {column: field for field, column in reversed(list(asked))}


def _rows(data: Any, *, base: Path | None, limit: int | None, used: Mapping[str, str]) -> Table:
    if data is None:
        return Table([{}])
    return read_table(as_data(data, limit=limit), base=base, limit=limit, used=used)


def load_models(
    asked: Patchscope | Recipe | None = None,
    *,
    model: Any = None,
    source_model: Any = None,
    target_model: Any = None,
    dtype: Any = "auto",
    device_map: Any = None,
    remote: Where = False,
    source_remote: Where = None,
    loader: Loader = load,
) -> tuple[Model, Model]:
    """M and M*, one object where they are one; what the caller names comes before what the recipe names.

    One model in two places is two. A model and its LoRA adapter, or two adapters of one model, share the
    weights that no adapter changes.

    Raises:
        InputError: A model cannot be loaded, or `dtype` names no dtype.
    """
    common = asked.model if isinstance(asked, Recipe) else builtin.NAME
    wanted = _first(source_model, model, asked and asked.source.model, common)
    other = _first(target_model, model, asked and asked.target.model, wanted)
    source_remote = remote if source_remote is None else source_remote
    how = {"dtype": dtype, "device_map": device_map}
    names = isinstance(other, str | Path) and isinstance(wanted, str | Path)
    if source_remote == remote and (other is wanted or (names and other == wanted)):
        source = target = loader(wanted, **how, weights=not on_server(remote))
    elif not (on_server(remote) or on_server(source_remote)) and (base := common_base(wanted, other)):
        plain = loader(base, **how)
        source, target = (proven(wear_named(plain, asked)) for asked in (wanted, other))
    else:
        source = loader(wanted, **how, weights=not on_server(source_remote))
        target = loader(other, **how, weights=not on_server(remote))
    adapter = asked and asked.target.adapter
    return source, proven(wear(target, adapter)) if adapter else target


def prove_elsewhere(prepared: Prepared, backend: Backend) -> Prepared:
    """Prove the models whose weights are on a server, each by a job of its own, the first time they are met.

    Args:
        prepared: The run.
        backend: Where its models run.

    Returns:
        The run, whose planner knows what was found.
    """
    places = (backend.source, backend.target) if isinstance(backend, Bridged) else (backend, backend)
    source, target = prepared.source, prepared.target
    if isinstance(places[0], Ndif):
        source = proven_on(source, places[0])
    if prepared.target is prepared.source:
        target = source
    elif isinstance(places[1], Ndif):
        target = proven_on(target, places[1])
    if source is prepared.source and target is prepared.target:
        return prepared
    sweep = replace(prepared.sweep, source=source.info, target=target.info)
    return replace(prepared, source=source, target=target, sweep=sweep)


def _first(*given: Any) -> Any:
    return next(one for one in given if one is not None)
