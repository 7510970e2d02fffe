"""The result of `prepare`: everything that runs need, resolved and checked. Nothing has run yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from patchscope_nn._util.digests import digest
from patchscope_nn.backends import Places
from patchscope_nn.fitting import Planned
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.metrics import ColumnUse, MetricUse
from patchscope_nn.models import Model
from patchscope_nn.recipe import slug
from patchscope_nn.runs.shards import Shard
from patchscope_nn.sweep import CellIndex, Sweep

#: Fields of a recipe that affect only what is computed from finished cells.
_POSTPROCESSING = ("best_over", "probe", "score")


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """One run: a Patchscope, or one method of a recipe.

    Attributes:
        recipe: The recipe, as a plain mapping with all defaults.
        sweep: The cells.
        source: M.
        target: M*.
        places: Where M and M* run.
        mapping: The mapping f.
        columns: The derived columns, which are computed before the metrics.
        metrics: The metrics.
        data_hash: Hex digest of the data rows.
        vectors: Hex digest of the files with vectors; empty if there are none.
        fit: The fit or training of the mapping before the run; None if there is none.
        n_dropped: The number of data rows that were dropped, because a column that is used has no value.
        shard: Which part of the cells runs; None for all.
    """

    recipe: Mapping[str, Any]
    sweep: Sweep
    source: Model
    target: Model
    places: Places
    mapping: ResolvedMapping
    columns: tuple[ColumnUse, ...]
    metrics: tuple[MetricUse, ...]
    data_hash: str
    vectors: str = ""
    fit: Planned | None = None
    n_dropped: int = 0
    shard: Shard | None = None

    @property
    def digest(self) -> str:
        """Hex digest of everything that affects results: recipe, data, models and mapping, not the execution.

        Postprocessing of finished cells is excluded, so that a run with another probe or summary reuses them.
        """
        models = [(info.name, info.revision, info.dtype) for info in (self.sweep.source, self.sweep.target)]
        fields = {name: value for name, value in self.recipe.items() if name not in _POSTPROCESSING}
        if not self.columns:
            fields.pop("columns", None)
        mapping = [self.mapping.name, self.mapping.digest]
        return digest([fields, self.data_hash, models, *mapping, self.vectors, *self.own_functions.items()])

    @property
    def own_functions(self) -> dict[str, str]:
        """The users' own columns and metrics, each with a hex digest of its code."""
        functions = [use.column for use in self.columns] + [use.metric for use in self.metrics]
        return {function.name: function.digest for function in functions if function and function.digest}

    @cached_property
    def cells(self) -> range:
        """The numbers of the cells that run: all of the sweep's, or those of the shard.

        Raises:
            InputError: There are too many shards.
        """
        starts = self.sweep.cells.starts
        return range(int(starts[-1])) if self.shard is None else self.shard.cells(starts)

    @cached_property
    def index(self) -> CellIndex:
        """Finds the cells of the sweep by what they are."""
        return CellIndex(self.sweep)

    @property
    def labels(self) -> list[str] | None:
        """The class of each data row; None if the recipe has no probe."""
        probe = self.recipe["probe"]
        return None if probe is None else [str(row[probe["label"]]) for row in self.sweep.rows]

    @property
    def source_prompts(self) -> list[str]:
        """The source prompt of each data row."""
        prompts: dict[int, str] = {}
        for entry in self.sweep.entries:
            prompts.setdefault(entry.row, self.sweep.source_text(entry.source))
        return list(prompts.values())


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The prepared runs of a recipe's methods. A Patchscope, or a recipe without methods, is a single run.

    Attributes:
        name: The recipe's name.
        title: The recipe's title.
        runs: The prepared runs by method; a single run has the recipe's name.
    """

    name: str
    title: str
    runs: Mapping[str, PreparedRun]

    @property
    def is_single(self) -> bool:
        """True if there are no methods to compare."""
        return len(self.runs) == 1

    @property
    def only(self) -> PreparedRun:
        """The single run.

        Raises:
            ValueError: There are several runs.
        """
        (run,) = self.runs.values()
        return run

    @property
    def digest(self) -> str:
        """Hex digest of everything that affects results, with the methods' names if there are several."""
        if self.is_single:
            return self.only.digest
        return digest([(name, run.digest) for name, run in self.runs.items()])

    @property
    def default_folder(self) -> Path:
        """`runs/NAME-HASH`, and for a shard its number: the same command finds the same folder."""
        shard = next(iter(self.runs.values())).shard
        return Path("runs") / f"{self.name}-{self.digest[:8]}{shard.suffix if shard else ''}"

    def folders(self, folder: Path) -> dict[str, Path]:
        """Return each run's folder: the folder itself or, with several methods, a subfolder for each."""
        if self.is_single:
            return dict.fromkeys(self.runs, folder)
        return {name: folder / slug(name) for name in self.runs}
