"""One offline HTML file that tells what a run asked, what came back, and how to do it again.

Nothing in it asks the network for anything. Model output is data here: it reaches the page as escaped
JSON and is put there with `textContent`, never as markup.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup

from patchscope_nn.plots import (
    REAL,
    as_list,
    figures,
    is_null,
    layer_means,
    layer_name,
    metric_columns,
    numbers,
    reads_sink,
    shorten,
    token,
    visible,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pandas as pd

TABLE_BYTES = 2_000_000  # with plotly's 4.8 MB and the figures, a report stays under 8 MB
MAX_CELLS = 20_000
_TEXT_LIMITS = (4000, 1000, 300, 120, 60)
_QUESTIONS = {
    "top_tokens": "which token comes next",
    "text": "to go on writing",
    "choice": "to choose one of the given answers",
    "hidden": "nothing yet: the mapped states themselves were kept",
}
_LOWER_IS_BETTER = re.compile(r"_nats$|surprisal|^nll|^kl|loss|rank|distance|perplexity")


def write_report(table: pd.DataFrame, *, manifest: Mapping[str, Any], path: Path) -> Path:
    """Write the report of one run; a reader of `path` sees the old file or the whole new one.

    Args:
        table: The tidy table of DESIGN section 4, one row per cell.
        manifest: What the run folder's manifest.json holds; keys it lacks are left out of the page.
        path: The file to write. Its folder is made if need be.

    Returns:
        `path`.

    Raises:
        InputError: Plotly is not installed.
    """
    recipe = _mapping(manifest.get("recipe"))
    declared = recipe.get("metrics") or ()
    metrics = metric_columns(table, declared=declared)
    drawn = figures(table, metrics=declared)
    page = _template().render(
        title=visible(recipe.get("title") or recipe.get("name") or "Patchscopes report"),
        summary=_summary(table, manifest=manifest, metrics=metrics),
        facts=_facts(table, manifest=manifest),
        titles=[title for title, _ in drawn],
        plotly=_plotly_js() if drawn else "",
        figures=_json([json.loads(figure.to_json()) for _, figure in drawn]),
        cells=_cells_json(table, metrics=metrics),
        n_cells=len(table),
        max_cells=MAX_CELLS,
        recipe=_yaml(recipe),
        manifest=_yaml({key: value for key, value in manifest.items() if key != "recipe"}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A command line can hold bytes that are no UTF-8 (surrogates); they must not cost us the report.
        draft.write_bytes(page.encode("utf-8", errors="replace"))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


def _plotly_js() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # noqa: S704 - plotly's own source, which nothing of the run reaches


def _json(value: object) -> Markup:
    """JSON that can stand inside a script element: it holds no `<`, so neither `</script>` nor `<!--`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped for its place in the two lines above


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _yaml(value: object) -> str:
    """Any manifest value as YAML; types that YAML does not know are written as text."""
    if not value:
        return ""
    plain = json.loads(json.dumps(value, default=str))
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return visible(text, keep="\n")


# ---- words -----------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _list(words: Iterable[object]) -> str:
    given = [visible(word) for word in words]
    return " and ".join([", ".join(given[:-1]), *given[-1:]]) if len(given) > 1 else "".join(given)


def _distinct(table: pd.DataFrame, *, column: str) -> list[Any]:
    return [] if column not in table.columns else list(table[column].dropna().unique())


def _layers(table: pd.DataFrame) -> str:
    """The source layers in words: one, or how many from which to which."""
    layers = sorted(set(numbers(table["source_layer"].dropna())))
    if len(layers) <= 1:
        return f"layer {layer_name(layers[0])}" if layers else "no layer"
    return f"{len(layers)} layers ({layer_name(layers[0])} to {layer_name(layers[-1])})"


def _summary(table: pd.DataFrame, *, manifest: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """The run in plain sentences, made from its data."""
    if table.empty:
        return ["This run has no cells yet."]
    control = table["control"].map(lambda name: REAL if is_null(name) else str(name))
    models = _mapping(manifest.get("models"))
    source = _distinct(table, column="source_model") or [
        _mapping(models.get("source")).get("name") or "a model"
    ]
    target = _distinct(table, column="target_model") or source
    question = next((_QUESTIONS[column] for column in _QUESTIONS if column in table.columns), "what it says")
    prompts = _count(
        len(_distinct(table[table["source_layer"].notna()], column="source_prompt")), "source prompt"
    )
    opening = (
        f"Hidden states of {_list(source)} at {_layers(table)} were taken from {prompts} and written into a "
        f"target prompt, on which {_list(target)} was asked {question}."
    )
    sentences = [opening]
    kinds = control[control != REAL].value_counts(sort=False)
    listed = _list(f"{count:,} {name}" for name, count in kinds.items())
    sentences.append(
        f"There are {_count(len(table), 'cell')} over {_count(table['row'].nunique(), 'data row')}: "
        f"{(control == REAL).sum():,} patched{f', and {listed} as controls' if listed else ''}."
    )
    failed = int(table["error"].notna().sum()) if "error" in table.columns else 0
    if failed:
        sentences.append(f"{_count(failed, 'cell')} failed; the table below says why.")
    sentences += [_headline(table, metric=metrics[0])] if metrics else []
    if not len(kinds):
        sentences.append(
            "No control was run, so a convincing answer does not yet show that the state caused it."
        )
    return sentences


def _headline(table: pd.DataFrame, *, metric: str) -> str:
    """Where the first metric is best, and what its controls give there."""
    means = layer_means(table, metric=metric).to_dict("records")
    real = [mean for mean in means if mean["control"] == REAL]
    if not real:
        return f"No patched cell has a value of {metric}."
    lower = bool(_LOWER_IS_BETTER.search(metric))
    best = (min if lower else max)(real, key=lambda mean: mean["mean"])
    source, target = best["source_layer"], best["target_layer"]
    places = f"source layer {layer_name(source)}"
    if source != target and not math.isnan(target):
        places += f" and target layer {layer_name(target)}"
    spread = "" if math.isnan(best["low"]) else f" (95 % interval {best['low']:.3g} to {best['high']:.3g})"
    here = [
        mean
        for mean in means
        if mean["control"] != REAL
        and (
            math.isnan(mean["source_layer"])
            or (mean["source_layer"], mean["target_layer"]) == (source, target)
        )
    ]
    controls = [f"{mean['control']} {mean['mean']:.3g}" for mean in here]
    beside = f"; its controls there: {', '.join(controls)}" if controls else ""
    most = "lowest" if lower else "highest"
    return f"Mean {metric} is {most} at {places}: {best['mean']:.3g}{spread}{beside}."


def _facts(table: pd.DataFrame, *, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Short facts for the head of the page: (name, value)."""
    recipe = _mapping(manifest.get("recipe"))
    sinks = sum(map(reads_sink, table.to_dict("records")))
    elapsed = _mapping(manifest.get("timings")).get("elapsed_s")
    given = {
        "Recipe": recipe.get("name"),
        "Paper": recipe.get("paper"),
        "Source model": ", ".join(map(str, _distinct(table, column="source_model"))),
        "Target model": ", ".join(map(str, _distinct(table, column="target_model"))),
        "Mapping": ", ".join(map(str, _distinct(table, column="mapping"))),
        "Attention-sink cells (position 0)": f"{sinks:,}" if sinks else None,
        "Seed": manifest.get("seed"),
        "Time": f"{elapsed:.3g} s" if isinstance(elapsed, int | float) else None,
        "Made": manifest.get("created"),
        "Command": manifest.get("command"),
    }
    return [(name, shorten(value, width=300)) for name, value in given.items() if value not in (None, "")]


# ---- the table of cells ----------------------------------------------------------------------------


def _cells_json(table: pd.DataFrame, *, metrics: Sequence[str]) -> Markup:
    """The cells for the page's own table, shortened until they fit.

    Returns:
        {"columns": [{label, kind, detail, pool?, values}], "limit": characters of a text}. A column with a
        pool holds indices into it, since prompts and tokens repeat from cell to cell.
    """
    shown = table.iloc[:MAX_CELLS]
    records = shown.to_dict("records")
    for limit in _TEXT_LIMITS:
        columns = [
            _column(values, **about) for about, values in _columns(records, metrics=metrics, limit=limit)
        ]
        packed = _json({"columns": columns, "limit": limit})
        if len(packed.encode("utf-8", errors="replace")) <= TABLE_BYTES:
            break
    return packed


def _column(values: list[Any], *, label: str, kind: str = "text", detail: bool = False) -> dict[str, Any]:
    column: dict[str, Any] = {"label": label, "kind": kind, "detail": detail, "values": values}
    pool = {value: index for index, value in enumerate(dict.fromkeys(values))}
    if kind == "text" and 2 * len(pool) <= len(values):
        column |= {"pool": list(pool), "values": [pool[value] for value in values]}
    return column


def _number(value: Any) -> float | int | None:
    """A JSON number, of as many digits as a reader can use, or null."""
    if is_null(value) or isinstance(value, str) or not math.isfinite(float(value)):
        return None
    number = float(f"{float(value):.4g}")
    return int(number) if number.is_integer() else number


def _quoted(cell: Mapping[Any, Any], *, side: str) -> str:
    """The tokens of one side with their positions, such as `'Wales' 5`."""
    tokens, positions = as_list(cell.get(f"{side}_token")), as_list(cell.get(f"{side}_position"))
    return ", ".join(f"{token(text)} {place}" for text, place in zip(tokens, positions, strict=False))


def _odds(cell: Mapping[Any, Any]) -> str:
    """The top tokens, or the choices, with their probabilities."""
    names = ("top_tokens", "top_probs") if "top_tokens" in cell else ("choices", "choice_probs")
    pairs = zip(*(as_list(cell.get(name)) for name in names), strict=False)
    return "  ".join(f"{token(text)} {probability:.3g}" for text, probability in pairs)


def _answer(cell: Mapping[Any, Any], *, limit: int) -> str:
    top = as_list(cell.get("top_tokens"))
    said = top[0] if top else cell.get("text", cell.get("choice"))
    return "" if is_null(said) else token(said) if top else _text(said, limit=limit)


def _text(value: Any, *, limit: int) -> str:
    """Text for the table: visible but for its line breaks, which the page shows, and not too long."""
    text = "" if is_null(value) else str(value)
    return visible(text[:limit], keep="\n")[:limit] + ("…" if len(text) > limit else "")


def _note(cell: Mapping[Any, Any]) -> str:
    notes = ["failed"] * (not is_null(cell.get("error")))
    return ", ".join(notes + ["position 0: attention sink"] * reads_sink(cell))


def _columns(
    records: Sequence[Mapping[Any, Any]], *, metrics: Sequence[str], limit: int
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """The page's columns: what each is, and its values. Those with `detail` show when a cell is opened."""
    names = list(records[0]) if records else []
    hidden = {"kind": "number", "detail": True}

    def texts(name: str, *, detail: bool = True) -> tuple[dict[str, Any], list[Any]]:
        about = {"label": name.replace("_", " "), "detail": detail}
        return about, [_text(record.get(name), limit=limit) for record in records]

    def counts(name: str, **about: Any) -> tuple[dict[str, Any], list[Any]]:
        return {"label": name, "kind": "number", **about}, [_number(record.get(name)) for record in records]

    yield counts("row")
    yield texts("control", detail=False)
    yield texts("source_prompt", detail=False)
    yield {"label": "token read"}, [_quoted(record, side="source") for record in records]
    yield counts("source_layer", label="source layer", kind="layer")
    yield counts("target_layer", label="target layer", kind="layer")
    yield {"label": "answer"}, [_answer(record, limit=limit) for record in records]
    yield from (counts(name) for name in metrics)
    yield {"label": "note"}, [_note(record) for record in records]
    yield texts("target_prompt")
    yield {"label": "token written", "detail": True}, [_quoted(record, side="target") for record in records]
    yield {"label": "most likely", "detail": True}, [_odds(record) for record in records]
    yield from (counts(name, **hidden) for name in _NUMBERS if name in names and name not in metrics)
    asked = [" ".join(map(token, as_list(record.get("reference_tokens")))) for record in records]
    yield {"label": "reference tokens", "detail": True}, asked
    yield from (texts(name) for name in _TEXTS if name in names)


_NUMBERS = ("entropy_nats", "surprisal_nats", "nll_nats")
_TEXTS = ("stopped", "mapping", "source_model", "target_model", "error")
