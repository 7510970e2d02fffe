"""Run: the results of one execution, finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from patchscope_nn._util.arguments import checked, checked_class
from patchscope_nn.analysis.cell_rows import CellRows
from patchscope_nn.analysis.tables import frame, light_frame
from patchscope_nn.errors import InputError
from patchscope_nn.metrics import described
from patchscope_nn.recipe import PROBE_METRICS
from patchscope_nn.runs.folder import REPORT, kept_probe_columns
from patchscope_nn.runs.manifest import Manifest, read_manifest
from patchscope_nn.runs.parts import read_parts

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@checked_class
@dataclass(frozen=True, kw_only=True)
class Run:
    """The results of one execution.

    Attributes:
        manifest: The contents of `manifest.json`.
        rows: A mapping for each cell, in the order of the sweep; with a folder, they are read on access.
        path: The folder; None if the run was kept in memory.
    """

    manifest: Manifest
    rows: CellRows
    path: Path | None = None

    def __repr__(self) -> str:
        where = f" in {self.path}" if self.path else ""
        return (
            f"<Run {self.manifest['recipe']['name']} {self.manifest['hash']}: {len(self.rows)} cells{where}>"
        )

    def table(self) -> pd.DataFrame:
        """Return the cells as a tidy pandas DataFrame, with a row for each."""
        return frame(self.rows, self.manifest["columns"])

    def heatmap(self, *, value: str | None = None) -> go.Figure:
        """Draw the texts read from the states, source prompts x layers, as a plotly Figure.

        Args:
            value: The column that shades the cells; None chooses one that fits the readout.

        Raises:
            InputError: plotly is not installed, or there is no column of this name.
        """
        from patchscope_nn.report.figures import text_heatmap

        return text_heatmap(self.table(), value=value).to_plotly()

    def ensemble(self, how: Literal["intersect", "average"] | None = None) -> pd.DataFrame:
        """Combine the next tokens of several target prompts for each state, as a pandas DataFrame.

        Args:
            how: `intersect` or `average`; None uses the Patchscope's `target.combine`.

        Raises:
            InputError: The run has no next tokens.
        """
        from patchscope_nn.analysis.ensembles import combine

        chosen = how or self.manifest["recipe"]["target"]["combine"]
        return combine(self.table(), how=chosen)

    def summary(self, *, by_source: bool = False) -> pd.DataFrame:
        """Return each metric's means with 95 % bootstrap intervals over data rows, as a tidy DataFrame.

        If the recipe has `best_over`, the best over these layers is taken first, for controls as well.

        Args:
            by_source: Also average over the target layers.

        Returns:
            A row for each metric, control (`patched` for the patched cells), pair of layers and scale. The
            columns are `metric`, `control`, `source_layer`, `target_layer` (missing if a control reads no
            layer, or if the best was taken over it), `scale` (only if there are several), `mean`, `low`,
            `high` (missing if there is a single data row), `n_rows`, `n_cells`.
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
        """Return the cells like `table`, but only with their places, metrics and errors, to save memory."""
        return light_frame(self.rows, self.manifest["columns"], metrics=self.metrics)

    @property
    def best_over(self) -> tuple[str, ...]:
        """The axes over which the summary and the figures take the best."""
        return tuple(self.manifest["recipe"].get("best_over") or ())

    @property
    def metrics(self) -> list[str]:
        """The names of this run's metrics; those of its probe come last."""
        named = [entry["name"] for entry in self.manifest["metrics"]]
        probed = self.manifest["recipe"].get("probe") and "shard" not in self.manifest
        return named + (list(PROBE_METRICS) if probed else [])

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
            folder: The folder; it is created if necessary.
            formats: Some of `pdf`, `svg` and `png`.

        Returns:
            The files.

        Raises:
            InputError: plotly or matplotlib is not installed, or a format is not valid.
        """
        from patchscope_nn.report import run_figures
        from patchscope_nn.report.figures import save_figures

        return save_figures(run_figures(*self._tables(), manifest=self.manifest), folder, formats=formats)

    def _tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the table of all cells, light if there are many, and the full table of the first cells."""
        from patchscope_nn.report import MAX_CELLS

        if len(self.rows) <= MAX_CELLS:
            return (table := self.table()), table
        return self.light_table(), frame(self.rows.first(MAX_CELLS), self.manifest["columns"])

    def _repr_html_(self) -> str:
        """Return the HTML that notebooks show."""
        from patchscope_nn.report import run_html

        where = "in memory" if self.path is None else str(self.path)
        return run_html(*self._tables(), manifest=self.manifest, where=where)


@checked
def load_run(path: str | Path) -> Run:
    """Read a run back from its folder, finished or not.

    Args:
        path: The folder.

    Returns:
        The run, with the finished cells.

    Raises:
        FolderError: It is not the folder of a run.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    rows = CellRows([*read_parts(folder).values()])
    recipe, digest = manifest["recipe"], manifest["hash"]
    probe = kept_probe_columns(folder, recipe.get("probe"), digest, n_cells=len(rows))
    return Run(manifest=manifest, rows=rows.with_columns(probe) if probe else rows, path=folder)
