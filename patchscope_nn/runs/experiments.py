"""Experiments: a recipe with several methods, each a run of its own, and what comparing them says.

FOLDER/METHOD/...        each method's run, as `runs.py` has it
FOLDER/comparison.json   means, paired differences and curves by layer
FOLDER/comparison.csv    the paired differences
FOLDER/comparison.html   the same as a page
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, overload

from patchscope_nn.runs import execute
from patchscope_nn._util.arguments import checked, checked_class
from patchscope_nn.analysis.comparison import ComparedRun, Comparison, compare
from patchscope_nn.errors import FolderError, InputError
from patchscope_nn.runs.execute import Progress
from patchscope_nn.models import Model
from patchscope_nn.runs.prepare import Prepared, used_columns
from patchscope_nn.runs.prepare import prepare as prepare_one
from patchscope_nn.proof import load
from patchscope_nn.recipe import Recipe, find, load_recipe, slug
from patchscope_nn.runs.folder import Run, load_run
from patchscope_nn.spec import Patchscope
from patchscope_nn.analysis.tables import frame

COMPARISON = "comparison"
#: What `run` takes that says how, and not what.
_HOW = (*("remote", "source_remote", "context", "max_rows", "memory", "optimisations", "jobs", "progress"),)


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
        drawn = [
            (f"{one} of all methods", comparison_curve(found.layers, metric=one, names=found.names))
            for one in found.metrics
        ]
        files = save_figures(drawn, folder, formats=formats)
        for name, run in self.runs.items():
            files += run.save_figures(Path(folder) / slug(name), formats=formats)
        return files

    def _repr_html_(self) -> str:
        """The experiment as a notebook shows it."""
        from patchscope_nn.report import comparison_html

        return comparison_html(self.compare(), title=self.title)


@dataclass(frozen=True, kw_only=True)
class PreparedMethods:
    """Every method of a recipe, prepared; nothing has run yet.

    Attributes:
        recipe: The recipe, as a plain mapping.
        methods: What each method needs, by its name.
    """

    recipe: Mapping[str, Any]
    methods: Mapping[str, Prepared]

    @property
    def digest(self) -> str:
        """Hex digest of the methods' names and what decides their results."""
        said = [(name, one.digest) for name, one in self.methods.items()]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    @property
    def default_folder(self) -> Path:
        """`runs/NAME-HASH`: the same command finds the same folder."""
        return Path("runs") / f"{self.recipe['name']}-{self.digest[:8]}"


@overload
def run(scope: Patchscope, *, out: str | Path | None = None, **options: Any) -> Run: ...
@overload
def run(scope: Recipe | str | Path, *, out: str | Path | None = None, **options: Any) -> Any: ...
@checked
def run(scope: Any, *, out: str | Path | None = None, **options: Any) -> Run | Experiment:
    """Run a Patchscope or a recipe.

    Args:
        scope: A Patchscope, a recipe, or a recipe's name or file.
        out: The folder; the same call again goes on where it was left. None keeps everything in memory.
        **options: How it runs, as in `execute.run`: `remote` (where M* runs: False, True, a URL, or `local`
            for a rehearsal), `source_remote`, `context`, `max_rows`, `memory`, `optimisations`, `jobs` and
            `progress`; and what it runs, as in `prepare.prepare`: `model`, `source_model`, `target_model`,
            `data`, `controls`, `metrics`, `seed`, `limit`, `base`, `dtype` and `device_map`.

    Returns:
        The run; of a recipe with several methods the experiment, a mapping from their names to their runs.

    Raises:
        InputError: Something given is wrong; nothing has been written.
        RunError: The run failed; with a folder, the same call goes on with it.
    """
    if not isinstance(scope, Patchscope | Recipe | str | Path):
        raise InputError(
            f"a {type(scope).__name__} cannot be run.",
            hint="Give a Patchscope, a Recipe, or the name or file of a recipe; a mapping becomes a recipe "
            "by ps.Recipe(**mapping).",
        )
    if isinstance(scope, str | Path):
        options["base"] = find(scope).parent if options.get("base") is None else options["base"]
        scope = load_recipe(scope)
    if not isinstance(scope, Recipe) or not scope.methods:
        return execute.run(scope, out=out, **options)
    how = {name: options.pop(name) for name in _HOW if name in options}
    where = {name: how[name] for name in ("remote", "source_remote") if name in how}
    return run_prepared(prepare(scope, **where, **options), out=out, **how)


def prepare(recipe: Recipe, **given: Any) -> Prepared | PreparedMethods:
    """Prepare a recipe, or each of its methods; a model that several use is loaded once.

    Args:
        recipe: The recipe.
        **given: As in `prepare.prepare`.

    Raises:
        InputError: Something given is wrong.
    """
    if not recipe.methods:
        return prepare_one(recipe, **given)
    loader = _Once()
    of_methods = recipe.of_methods()
    # A row in which a column of any method is missing is left out of all, so that all have the same rows.
    used = {column: field for method in of_methods.values() for column, field in used_columns(method).items()}
    methods = {
        name: prepare_one(one, loader=loader, also_used=used, **given) for name, one in of_methods.items()
    }
    return PreparedMethods(recipe=recipe.model_dump(mode="json"), methods=methods)


class _Once:
    """`models.load`, which loads nothing twice."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[Any, ...], tuple[Any, Model]] = {}

    def __call__(self, model: Any, **options: Any) -> Model:
        named = str(model) if isinstance(model, str | Path) else id(model)
        key = (named, repr(sorted(options.items())))
        if key not in self._loaded:
            self._loaded[key] = model, load(model, **options)
        return self._loaded[key][1]


@checked
def run_prepared(
    prepared: Prepared | PreparedMethods,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Run | Experiment:
    """Run what `prepare` prepared; of several methods one after the other, and then compare them.

    Arguments as in `execute.run_prepared`.
    """
    if isinstance(prepared, Prepared):
        return execute.run_prepared(prepared, out=out, progress=progress, **options)
    folder, total = None if out is None else Path(out), 0
    if folder is not None and (folder / "manifest.json").exists():
        raise FolderError(f"{folder} holds a run.", hint="Give another --out: a folder for all the methods.")
    sizes = {name: len(one.sweep.cells) for name, one in prepared.methods.items()}
    runs: dict[str, Run] = {}
    for name, one in prepared.methods.items():
        place = None if folder is None else folder / slug(name)
        step = _step(progress, before=total, total=sum(sizes.values()))
        runs[name] = execute.run_prepared(one, out=place, progress=step, **options)
        total += sizes[name]
    experiment = Experiment(title=prepared.recipe["title"], runs=runs, path=folder)
    if folder is not None:
        _write(experiment, folder)
    return experiment


def _step(progress: Progress | None, *, before: int, total: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, _own: progress(before + done, total)


def _write(experiment: Experiment, folder: Path) -> None:
    comparison = experiment.compare()
    folders = {name: slug(name) for name in experiment}
    said = {"title": experiment.title, "folders": folders, **comparison.records()}
    text = json.dumps(said, indent=2, ensure_ascii=False)
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
    place = Path(folder)
    file = place / f"{COMPARISON}.json"
    if not file.exists():
        return load_run(place)
    said = json.loads(file.read_text(encoding="utf-8"))
    runs = {name: load_run(place / one) for name, one in said["folders"].items()}
    return Experiment(title=said["title"], runs=runs, path=place)


def load_runs(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Read runs back, each under a name that no other has.

    Args:
        folders: Run folders, or folders of experiments, which stand for all their runs.

    Returns:
        The runs: those of an experiment by method, others by recipe, or by folder where recipes are alike.

    Raises:
        FolderError: One is no such folder.
    """
    found: list[tuple[str, Path]] = []
    for folder in map(Path, folders):
        file = folder / f"{COMPARISON}.json"
        if file.exists():
            said = json.loads(file.read_text(encoding="utf-8"))
            found += [(name, folder / place) for name, place in said["folders"].items()]
        else:
            found.append((load_run(folder).manifest["recipe"]["name"], folder))
    names = [name for name, _ in found]
    last = [place.name for _, place in found]
    runs: dict[str, Run] = {}
    for (name, place), short in zip(found, last, strict=True):
        called = name if names.count(name) == 1 else short if last.count(short) == 1 else str(place)
        runs[called] = load_run(place)
    return runs
