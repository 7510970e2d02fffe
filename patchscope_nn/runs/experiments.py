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
from itertools import islice
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
    """A mapping from each method's name to its run.

    Attributes:
        title: What the recipe asks.
        runs: The runs, in the recipe's order.
        path: The folder; None where it was kept in memory.
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

    def compare(self) -> Comparison:
        """Every method's means, and its paired differences to the first and to its own controls.

        Raises:
            InputError: The methods share no metric, or no cell.
        """
        return compare_runs(self.runs)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page that shows the methods side by side.

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
        """Write figures for a paper: the methods in one, and each method's own in a folder of its name.

        Args:
            folder: The folder; it is made if need be.
            formats: Of `pdf`, `svg` and `png`.

        Returns:
            The files.

        Raises:
            InputError: plotly or matplotlib is not installed, or a format is none of these.
        """
        from patchscope_nn.report.figures import comparison_curve, save_figures

        found = self.compare()
        known = {name: info for run in self.runs.values() for name, info in described(run.manifest).items()}
        drawn = [
            (
                f"{metric} of all methods",
                comparison_curve(found.layers, metric=metric, names=found.names, known=known),
            )
            for metric in found.metrics
        ]
        files = save_figures(drawn, folder, formats=formats)
        for name, run in self.runs.items():
            files += run.save_figures(Path(folder) / slug(name), formats=formats)
        return files

    def _repr_html_(self) -> str:
        """The experiment as a notebook shows it."""
        from patchscope_nn.report import comparison_html

        return comparison_html(self.compare(), title=self.title)


def save_comparison(experiment: Experiment, folder: Path) -> None:
    """Write what comparing an experiment's methods gives: JSON, CSV, and with plotly the page.

    Args:
        experiment: The experiment.
        folder: The folder that holds the folders of its runs.
    """
    comparison = experiment.compare()
    folders = {name: slug(name) for name in experiment}
    record = {"title": experiment.title, "folders": folders, **comparison.records()}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / f"{COMPARISON}.json").write_text(f"{text}\n", encoding="utf-8")
    comparison.differences.to_csv(folder / f"{COMPARISON}.csv", index=False)
    if importlib.util.find_spec("plotly"):
        write_page(comparison, experiment.runs, path=folder / f"{COMPARISON}.html", title=experiment.title)


def compare_runs(runs: Mapping[str, Run], *, best: Sequence[str] | None = None) -> Comparison:
    """Compare runs cell by cell.

    Args:
        runs: The runs by what to call them; the first is what the others are compared with.
        best: What the best is taken over; None takes what each run's recipe says.

    Raises:
        InputError: The runs share no metric, or no cell.
    """
    return compare(
        [
            ComparedRun(
                name=name,
                table=one.light_table(),
                metrics=tuple(one.metrics),
                best=one.best_over if best is None else tuple(best),
                score=one.manifest["recipe"].get("score"),
                known=described(one.manifest),
                data=str(one.manifest.get("data_hash")),
            )
            for name, one in runs.items()
        ]
    )


def write_page(comparison: Comparison, runs: Mapping[str, Run], *, path: Path, title: str) -> Path:
    """Write the page that shows runs side by side.

    Raises:
        InputError: plotly is not installed.
    """
    from patchscope_nn.report import MAX_CELLS, Side, write_comparison

    most = MAX_CELLS // len(runs)
    sides = [
        Side(
            name=name,
            manifest=one.manifest,
            metrics=tuple(one.metrics),
            first_cells=frame(list(islice(one.rows, most)), one.manifest["columns"]),
            n_cells=len(one.rows),
        )
        for name, one in runs.items()
    ]
    return write_comparison(comparison, sides, path=path, title=title)


def open_finished(folder: str | Path) -> Run | Experiment:
    """Read a run or an experiment back from its folder.

    Raises:
        FolderError: It is no such folder.
    """
    folder = Path(folder)
    record = _comparison_of(folder)
    if record is None:
        return load_run(folder)
    runs = {name: load_run(folder / place) for name, place in record["folders"].items()}
    return Experiment(title=record["title"], runs=runs, path=folder)


def load_runs(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Read runs back, each under a name that no other has.

    Args:
        folders: Run folders, or folders of experiments, which stand for all their runs.

    Returns:
        The runs: those of an experiment by method, others by recipe, or by folder where recipes are alike.

    Raises:
        FolderError: A folder is neither.
    """
    named: list[tuple[str, Path]] = []
    for folder in map(Path, folders):
        record = _comparison_of(folder)
        if record is None:
            named.append((load_run(folder).manifest["recipe"]["name"], folder))
        else:
            named += [(name, folder / place) for name, place in record["folders"].items()]
    names, last = [name for name, _ in named], [folder.name for _, folder in named]
    runs: dict[str, Run] = {}
    for name, folder in named:
        unique = [known for known, all_of in ((name, names), (folder.name, last)) if all_of.count(known) == 1]
        runs[next(iter(unique), str(folder))] = load_run(folder)
    return runs


def _comparison_of(folder: Path) -> dict[str, Any] | None:
    """What an experiment's folder says of it; None where the folder is a single run's."""
    file = folder / f"{COMPARISON}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
