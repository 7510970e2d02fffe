"""What `prepare` gives: everything that runs need, resolved and checked. Nothing has run yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscope_nn._util.digests import digest
from patchscope_nn.backends import Places
from patchscope_nn.fitting import Planned
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.metrics import ColumnUse, MetricUse
from patchscope_nn.models import Model
from patchscope_nn.recipe import slug
from patchscope_nn.sweep import Sweep

#: Fields of a recipe that decide what is made of finished cells, and not what the cells are.
_AFTERWARDS = ("best_over", "probe", "score")


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """One run: a Patchscope, or one method of a recipe.

    Attributes:
        recipe: What is asked, as a plain mapping with all defaults.
        sweep: The cells.
        source: M.
        target: M*.
        places: Where M and M* run.
        mapping: f.
        columns: What is derived from each cell's readout, before the metrics.
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
    places: Places
    mapping: ResolvedMapping
    columns: tuple[ColumnUse, ...]
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
        models = [(info.name, info.revision, info.dtype) for info in (self.sweep.source, self.sweep.target)]
        asked = {name: value for name, value in self.recipe.items() if name not in _AFTERWARDS}
        if not self.columns:
            asked.pop("columns", None)
        functions = [use.column for use in self.columns] + [use.metric for use in self.metrics]
        own = [(one.name, one.digest) for one in functions if one is not None and one.digest]
        mapping = [self.mapping.name, self.mapping.digest]
        return digest([asked, self.data_hash, models, *mapping, self.vectors, *own])

    @property
    def labels(self) -> list[str] | None:
        """The class of each data row, where the recipe has a probe."""
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
    """An experiment: the run of each method. A Patchscope, or a recipe without methods, is a single run.

    Attributes:
        name: The recipe's name.
        title: What it asks.
        runs: The prepared runs by method; a single run has the recipe's name.
    """

    name: str
    title: str
    runs: Mapping[str, PreparedRun]

    @property
    def is_single(self) -> bool:
        """Whether there are no methods to compare."""
        return len(self.runs) == 1

    @property
    def only(self) -> PreparedRun:
        """The run of an experiment of one.

        Raises:
            ValueError: There are several.
        """
        (run,) = self.runs.values()
        return run

    @property
    def digest(self) -> str:
        """Hex digest of what decides the results, with the methods' names where there are several."""
        if self.is_single:
            return self.only.digest
        return digest([(name, run.digest) for name, run in self.runs.items()])

    @property
    def default_folder(self) -> Path:
        """`runs/NAME-HASH`: the same command finds the same folder."""
        return Path("runs") / f"{self.name}-{self.digest[:8]}"

    def folders(self, folder: Path) -> dict[str, Path]:
        """Where each run is kept: in the folder itself, or of several in a folder of the method's name."""
        if self.is_single:
            return dict.fromkeys(self.runs, folder)
        return {name: folder / slug(name) for name in self.runs}
