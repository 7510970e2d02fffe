"""The page: its parts put into the template, and written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup

from patchscope_nn._util.files import replacing
from patchscope_nn.metrics import described
from patchscope_nn.report.cards import cards
from patchscope_nn.report.cells import cells_json, script_json
from patchscope_nn.report.figures import figures, metric_columns, visible
from patchscope_nn.report.summary import as_mapping, controls_said, facts, metric_names, summary

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

#: The most cells of which a page says everything; its figures of metrics are of all.
MAX_CELLS = 12_000
_ELSEWHERE = ("recipe", "references")  # what the page shows in other places
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    table: pd.DataFrame, *, manifest: Mapping[str, Any], path: Path, shown: pd.DataFrame | None = None
) -> Path:
    """Write the report of one run; a reader of `path` sees the old file or the whole new one.

    Args:
        table: The tidy table of DESIGN section 4, one row per cell.
        manifest: What the run folder's manifest.json holds; keys it lacks are left out of the page.
        path: The file to write. Its folder is made if need be.
        shown: The first `MAX_CELLS` cells, where `table` leaves out what a large run's cells say.

    Returns:
        `path`.

    Raises:
        InputError: Plotly is not installed.
    """
    page = _page(table, table.iloc[:MAX_CELLS] if shown is None else shown, manifest=manifest)
    return write_whole(page, path)


def run_figures(
    table: pd.DataFrame, shown: pd.DataFrame, *, manifest: Mapping[str, Any]
) -> list[tuple[str, go.Figure]]:
    """The figures of a run, titled.

    Args:
        table: The table of all cells.
        shown: That of the cells of which everything is shown.
        manifest: The run's manifest.

    Raises:
        InputError: Plotly is not installed.
    """
    recipe = as_mapping(manifest.get("recipe"))
    best = tuple(recipe.get("best_over") or ())
    return figures(shown, metrics=metric_names(manifest), whole=table, best=best, known=described(manifest))


def write_whole(page: str, path: Path) -> Path:
    """Write a page; a reader of `path` sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        # A command line can hold bytes that are no UTF-8 (surrogates); they must not cost us the report.
        draft.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def _page(table: pd.DataFrame, shown: pd.DataFrame, *, manifest: Mapping[str, Any]) -> str:
    recipe = as_mapping(manifest.get("recipe"))
    metrics = metric_columns(table, declared=metric_names(manifest))
    drawn = run_figures(table, shown, manifest=manifest)
    return template("report.html.jinja").render(
        title=visible(recipe.get("title") or recipe.get("name") or "Patchscopes report"),
        summary=summary(table, manifest=manifest, metrics=metrics),
        facts=facts(table, manifest=manifest),
        titles=[title for title, _ in drawn],
        plotly=plotly_js() if drawn else "",
        cards=cards(
            shown,
            references=manifest.get("references") or (),
            metric=next(iter(metrics), None),
            known=described(manifest),
        ),
        controls=controls_said(table),
        command=visible(manifest.get("command") or ""),
        figures=script_json([json.loads(figure.to_json()) for _, figure in drawn]),
        cells=cells_json(shown, metrics=metrics, derived=list(manifest.get("derived") or ())),
        n_cells=len(table),
        max_cells=MAX_CELLS,
        recipe=_yaml(recipe),
        manifest=_yaml({key: value for key, value in manifest.items() if key not in _ELSEWHERE}),
    )


def template(name: str) -> jinja2.Template:
    """One of the page templates, which escape what is put into them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def plotly_js() -> Markup:
    """Plotly's own source, for a page that loads nothing."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # noqa: S704 - plotly's own source, which nothing of the run reaches


def _yaml(value: object) -> str:
    """Any manifest value as YAML; types that YAML does not know are written as text."""
    if not value:
        return ""
    plain = json.loads(json.dumps(value, default=str))
    text = _dump(plain, allow_unicode=True)
    if yaml.safe_load(text) != plain:  # PyYAML writes U+0085 so that it reads it back as a space
        text = _dump(plain, allow_unicode=False)
    return visible(text, keep="\n")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as recipes do, in double quotes, and not with each line end doubled."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _dump(value: object, *, allow_unicode: bool) -> str:
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, width=100))
