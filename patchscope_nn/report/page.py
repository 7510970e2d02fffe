"""The page of one run: fill in the template and write the file atomically."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup

from patchscope_nn._util.files import replacing
from patchscope_nn._util.yaml_text import yaml_text
from patchscope_nn.metrics import described
from patchscope_nn.report.cards import cards
from patchscope_nn.report.cells import cells_json, script_json
from patchscope_nn.report.figures import figures
from patchscope_nn.report.figures.drawing import Drawing
from patchscope_nn.report.figures.table import metric_columns
from patchscope_nn.report.figures.text import visible
from patchscope_nn.report.summary import described_controls, facts, metric_names, section, summary

if TYPE_CHECKING:
    import pandas as pd

#: The number of cells that a page lists; figures of metrics use all cells.
MAX_CELLS = 3_000
_ELSEWHERE = ("recipe", "references")  # parts of the manifest that the page shows in other sections
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    table: pd.DataFrame, *, manifest: Mapping[str, Any], path: Path, first_cells: pd.DataFrame | None = None
) -> Path:
    """Write the report of one run to `path` atomically, creating its folder if necessary.

    Args:
        table: The run's table, one row per cell.
        manifest: The content of the run folder's manifest.json; the page leaves out what it does not have.
        path: The file to write.
        first_cells: The first `MAX_CELLS` cells with all columns, if `table` lacks the columns of readouts.

    Raises:
        InputError: Plotly is not installed.
    """
    first_cells = table.iloc[:MAX_CELLS] if first_cells is None else first_cells
    recipe = section(manifest, "recipe")
    metrics = metric_columns(table, declared=metric_names(manifest))
    drawn = run_figures(table, first_cells, manifest=manifest)
    page = template("report.html.jinja").render(
        title=visible(recipe.get("title") or recipe.get("name") or "Patchscopes report"),
        summary=summary(table, manifest=manifest, metrics=metrics),
        facts=facts(table, manifest=manifest),
        titles=[title for title, _ in drawn],
        plotly=plotly_js() if drawn else "",
        cards=cards(first_cells, metric=next(iter(metrics), None), manifest=manifest),
        controls=described_controls(table),
        command=visible(manifest.get("command") or ""),
        figures=script_json([figure.plain() for _, figure in drawn]),
        cells=cells_json(first_cells, metrics=metrics, derived=list(manifest.get("derived") or ())),
        n_cells=len(table),
        max_cells=MAX_CELLS,
        recipe=_yaml(recipe),
        manifest=_yaml({key: value for key, value in manifest.items() if key not in _ELSEWHERE}),
    )
    return write_whole(page, path)


def run_figures(
    table: pd.DataFrame, first_cells: pd.DataFrame, *, manifest: Mapping[str, Any]
) -> list[tuple[str, Drawing]]:
    """Draw the figures of a run, each with its title; arguments are as in `write_report`.

    Raises:
        InputError: Plotly is not installed.
    """
    best = tuple(section(manifest, "recipe").get("best_over") or ())
    return figures(
        first_cells, metrics=metric_names(manifest), all_cells=table, best=best, known=described(manifest)
    )


def write_whole(page: str, path: Path) -> Path:
    """Write a page atomically: readers of `path` see the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        # A command line may contain bytes that are not valid UTF-8, which Python decodes to surrogates.
        draft.write_bytes(page.encode("utf-8", errors="replace"))
    return path


@cache
def template(name: str) -> jinja2.Template:
    """Load a page template; it escapes every value that is filled in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def plotly_js() -> Markup:
    """Return plotly's source, to embed in a page that must not load anything."""
    source = pkgutil.get_data("plotly", "package_data/plotly.min.js") or b""
    return Markup(source.decode())  # noqa: S704 - plotly's own source; it contains nothing from the run


def _yaml(value: object) -> str:
    """Write a part of the manifest as YAML; values of types that YAML lacks become text."""
    if not value:
        return ""
    written = json.dumps(value, default=str)
    plain = json.loads(written)
    text = yaml_text(plain)
    if (
        "\\u" in written and yaml.safe_load(text) != plain
    ):  # PyYAML writes U+0085 unescaped, and reads it back as a space
        text = yaml_text(plain, allow_unicode=False)
    return visible(text, keep="\n")
