"""Run: what one execution leaves, finished or not, read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchscope_nn._util.arguments import checked, checked_class
from patchscope_nn.analysis.tables import frame, light_frame
from patchscope_nn.errors import InputError
from patchscope_nn.metrics import described
from patchscope_nn.recipe import PROBE_METRICS
from patchscope_nn.runs.folder import LINES, REPORT, kept_probe_columns
from patchscope_nn.runs.lazy_rows import Lines, Widened
from patchscope_nn.runs.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@checked_class
@dataclass(frozen=True, kw_only=True)
class Run:
    """One execution: what ran and what came out.

    Attributes:
        manifest: What ran, as `manifest.json` holds it.
        rows: One mapping for each cell, in the order of the sweep; with a folder, read when asked for.
        path: Its folder; None where it was kept in memory.
    """

    manifest: Manifest
    rows: Sequence[Mapping[str, Any]]
    path: Path | None = None

    def __repr__(self) -> str:
        where = f" in {self.path}" if self.path else ""
        return (
            f"<Run {self.manifest['recipe']['name']} {self.manifest['hash']}: {len(self.rows)} cells{where}>"
        )

    def table(self) -> pd.DataFrame:
        """The cells as a tidy pandas DataFrame, one row for each."""
        return frame(self.rows, self.manifest["columns"])

    def heatmap(self, *, value: str | None = None) -> go.Figure:
        """What the states say, source prompts x layers, as a plotly Figure.

        Args:
            value: The column that shades the cells; None takes the one that fits the readout.

        Raises:
            InputError: plotly is not installed, or there is no such column.
        """
        from patchscope_nn.report.figures import text_heatmap

        return text_heatmap(self.table(), value=value)

    def ensemble(self, how: Literal["intersect", "average"] | None = None) -> pd.DataFrame:
        """What several target prompts say of each state, put together, as a pandas DataFrame.

        Args:
            how: `intersect` or `average`; None is the Patchscope's `target.combine`.

        Raises:
            InputError: The run holds no next tokens.
        """
        from patchscope_nn.analysis.ensembles import combine

        chosen = how or self.manifest["recipe"]["target"]["combine"]
        return combine(self.table(), how=chosen)

    def summary(self, *, by_source: bool = False) -> pd.DataFrame:
        """The mean of each metric with its 95 % bootstrap interval over data rows, as a tidy DataFrame.

        Where the recipe has `best_over`, the best over these layers is taken first, for controls alike.

        Args:
            by_source: Average over the target layers too.

        Returns:
            A line for each metric, control (`patched` for the real cells), pair of layers and scale:
            `metric`, `control`, `source_layer`, `target_layer` (none where a control reads no layer, or where
            the best was taken over it), `scale` (only where there are several), `mean`, `low`, `high` (none
            where there is a single row), `n_rows`, `n_cells`.
        """
        from patchscope_nn.analysis.statistics import summarise

        return summarise(
            self.light_table(),
            metrics=self.metrics,
            best=self.best_over,
            by_source=by_source,
            known=described(self.manifest),
        )

    def light_table(self) -> pd.DataFrame:
        """The cells as `table` gives them, without what was read of them: places, metrics and errors."""
        return light_frame(self.rows, self.manifest["columns"], metrics=self.metrics)

    @property
    def best_over(self) -> tuple[str, ...]:
        """What the summary and the figures take the best over."""
        return tuple(self.manifest["recipe"].get("best_over") or ())

    @property
    def metrics(self) -> list[str]:
        """The names of this run's metrics, those of its probe last."""
        named = [entry["name"] for entry in self.manifest["metrics"]]
        return named + (list(PROBE_METRICS) if self.manifest["recipe"].get("probe") else [])

    def report(self, path: str | Path | None = None) -> Path:
        """Write the HTML report.

        Args:
            path: The file; None writes `report.html` in the run's folder.

        Returns:
            The file.

        Raises:
            InputError: plotly is not installed, or the run has no folder and no path was given.
        """
        from patchscope_nn.report import write_report

        if path is None and self.path is None:
            raise InputError("this run has no folder.", hint="Give a path: run.report('report.html').")
        file = Path(path) if path is not None else Path(self.path or ".") / REPORT
        table, first_cells = self._tables()
        return write_report(table, manifest=self.manifest, path=file, first_cells=first_cells)

    def save_figures(
        self, folder: str | Path, *, formats: Sequence[str] = ("pdf", "svg", "png")
    ) -> list[Path]:
        """Write the report's figures for a paper, without a browser.

        Args:
            folder: The folder; it is made if need be.
            formats: Of `pdf`, `svg` and `png`.

        Returns:
            The files.

        Raises:
            InputError: plotly or matplotlib is not installed, or a format is none of these.
        """
        from patchscope_nn.report import run_figures
        from patchscope_nn.report.figures import save_figures

        return save_figures(run_figures(*self._tables(), manifest=self.manifest), folder, formats=formats)

    def _tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The table of all cells, which may leave out what they say, and that of those a page shows."""
        from patchscope_nn.report import MAX_CELLS

        if len(self.rows) <= MAX_CELLS:
            return (table := self.table()), table
        return self.light_table(), frame(list(islice(self.rows, MAX_CELLS)), self.manifest["columns"])

    def _repr_html_(self) -> str:
        """The run as a notebook shows it."""
        from patchscope_nn.report import run_html

        where = "in memory" if self.path is None else str(self.path)
        return run_html(*self._tables(), manifest=self.manifest, where=where)


@checked
def load_run(path: str | Path) -> Run:
    """Read a run back from its folder, finished or not.

    Args:
        path: The folder.

    Returns:
        The run, with the cells that are done.

    Raises:
        FolderError: It is no run folder.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    lines = Lines(folder / LINES)
    probe = kept_probe_columns(folder, manifest["recipe"].get("probe"), n_cells=len(lines))
    return Run(manifest=manifest, rows=Widened(lines, probe) if probe else lines, path=folder)
