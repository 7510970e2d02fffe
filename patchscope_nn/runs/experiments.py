"""Experiments: the runs of a recipe's methods, and their comparison.

FOLDER/METHOD/...        each method's run, as in `folder.py`
FOLDER/comparison.json   means, paired differences and curves by layer
FOLDER/comparison.csv    the paired differences
FOLDER/comparison.html   the same as a page
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchscope_nn._util.arguments import checked_class
from patchscope_nn.analysis.comparison import ComparedRun, Comparison, compare
from patchscope_nn.analysis.tables import frame
from patchscope_nn.errors import InputError
from patchscope_nn.metrics import described
from patchscope_nn.recipe import slug
from patchscope_nn.runs.results import Run, load_run

COMPARISON = "comparison"


@checked_class
@dataclass(frozen=True, kw_only=True)
class Experiment(Mapping[str, Run]):
    """The runs of a recipe's methods, as a mapping from each method's name to its run.

    Attributes:
        title: The recipe's title.
        runs: The runs, in the recipe's order.
        path: The folder; None if the experiment was kept in memory.
    """

    title: str
    runs: Mapping[str, Run] = field(repr=False)
    path: Path | None = None

    def __getitem__(self, name: str) -> Run:
        return self.runs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def shard(self) -> str | None:
        """Which shard the runs are, for example `3/16`; None if they are whole."""
        return next(iter(self.runs.values())).manifest.get("shard")

    def compare(self) -> Comparison:
        """Compute each method's means, and its paired differences to the first method and to its controls.

        Raises:
            InputError: The methods have no metric or no cell in common.
        """
        return compare_runs(self.runs)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page that compares the methods.

        Args:
            path: The file; None writes `comparison.html` in the experiment's folder.

        Returns:
            The file.

        Raises:
            InputError: plotly is not installed, or there is no folder and no path was given.
        """
        if path is None and self.path is None:
            raise InputError("this experiment has no folder.", hint="Give a path: report('comparison.html').")
        file = Path(path) if path is not None else Path(self.path or ".") / f"{COMPARISON}.html"
        return write_page(self.compare(), self.runs, path=file, title=self.title)

    def save_figures(
        self, folder: str | Path, *, formats: Sequence[str] = ("pdf", "svg", "png")
    ) -> list[Path]:
        """Write figures for a paper: comparisons of the methods, and each method's figures in a subfolder.

        Args:
            folder: The folder; it is created if necessary.
            formats: Some of `pdf`, `svg` and `png`.

        Returns:
            The files.

        Raises:
            InputError: plotly or matplotlib is not installed, or a format is not valid.
        """
        from patchscope_nn.report.figures import comparison_curve, save_figures

        comparison = self.compare()
        known = {name: info for run in self.runs.values() for name, info in described(run.manifest).items()}
        drawn = [
            (
                f"{metric} of all methods",
                comparison_curve(comparison.layers, metric=metric, names=comparison.names, known=known),
            )
            for metric in comparison.metrics
        ]
        files = save_figures(drawn, folder, formats=formats)
        for name, run in self.runs.items():
            files += run.save_figures(Path(folder) / slug(name), formats=formats)
        return files

    def _repr_html_(self) -> str:
        """Return the HTML that notebooks show."""
        from patchscope_nn.report import comparison_html

        return comparison_html(self.compare(), title=self.title)


def save_comparison(experiment: Experiment, folder: Path, *, report: bool = True) -> None:
    """Write the comparison of an experiment's methods: JSON, CSV and, if plotly is installed, the page.

    Shards of methods may have no cell in common, so they are not compared before they are merged.

    Args:
        experiment: The experiment.
        folder: The folder that contains the folders of its runs.
        report: True to write the page.
    """
    record: dict[str, Any] = {"title": experiment.title, "folders": {name: slug(name) for name in experiment}}
    comparison = None if experiment.shard else experiment.compare()
    if comparison is not None:
        record |= comparison.records()
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / f"{COMPARISON}.json").write_text(f"{text}\n", encoding="utf-8")
    if comparison is None:
        return
    comparison.differences.to_csv(folder / f"{COMPARISON}.csv", index=False)
    if report and importlib.util.find_spec("plotly"):
        write_page(comparison, experiment.runs, path=folder / f"{COMPARISON}.html", title=experiment.title)


def compare_runs(runs: Mapping[str, Run], *, best: Sequence[str] | None = None) -> Comparison:
    """Compare runs cell by cell.

    Args:
        runs: The runs by name; the others are compared with the first.
        best: The axes over which the best is taken; None uses `best_over` of each run's recipe.

    Raises:
        InputError: The runs have no metric or no cell in common.
    """
    return compare(
        [
            ComparedRun(
                name=name,
                table=run.light_table(),
                metrics=tuple(run.metrics),
                best=run.best_over if best is None else tuple(best),
                score=run.manifest["recipe"].get("score"),
                known=described(run.manifest),
                data=str(run.manifest.get("data_hash")),
            )
            for name, run in runs.items()
        ]
    )


def write_page(comparison: Comparison, runs: Mapping[str, Run], *, path: Path, title: str) -> Path:
    """Write the page that compares runs.

    Raises:
        InputError: plotly is not installed.
    """
    from patchscope_nn.report import MAX_CELLS, Side, write_comparison

    max_cells = MAX_CELLS // len(runs)
    sides = [
        Side(
            name=name,
            manifest=run.manifest,
            metrics=tuple(run.metrics),
            first_cells=frame(run.rows.first(max_cells), run.manifest["columns"]),
            n_cells=len(run.rows),
        )
        for name, run in runs.items()
    ]
    return write_comparison(comparison, sides, path=path, title=title)


def open_finished(folder: str | Path) -> Run | Experiment:
    """Read a run or an experiment back from its folder.

    Raises:
        FolderError: It is not the folder of a run or an experiment.
    """
    folder = Path(folder)
    record = experiment_record(folder)
    if record is None:
        return load_run(folder)
    runs = {name: load_run(folder / subfolder) for name, subfolder in record["folders"].items()}
    return Experiment(title=record["title"], runs=runs, path=folder)


def load_runs(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Read runs back, each under a unique name.

    Args:
        folders: Folders of runs, or of experiments, which stand for all their runs.

    Returns:
        The runs by name. Runs of an experiment are named by method, other runs by recipe. If names coincide,
        the folder is the name.

    Raises:
        FolderError: A folder is neither that of a run nor that of an experiment.
    """
    named: list[tuple[str, Path]] = []
    for folder in map(Path, folders):
        record = experiment_record(folder)
        if record is None:
            named.append((load_run(folder).manifest["recipe"]["name"], folder))
        else:
            named += [(name, folder / subfolder) for name, subfolder in record["folders"].items()]
    names, last_parts = [name for name, _ in named], [folder.name for _, folder in named]
    runs: dict[str, Run] = {}
    for name, folder in named:
        if names.count(name) == 1:
            key = name
        elif last_parts.count(folder.name) == 1:
            key = folder.name
        else:
            key = str(folder)
        runs[key] = load_run(folder)
    return runs


def experiment_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of an experiment from its folder; None if the folder has none."""
    file = folder / f"{COMPARISON}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
