"""Sections 4.3 and 4.4: from which layers an entity is described, by its own model or by another one.

The few-shot description prompt asks. Another model reads the states through maps, as in `cross_model`.
Besides ROUGE-L against a short description, a text is judged by key words chosen before anything was run: it
resolves its entity if one of them is in the description, which ends where the model goes on with another item
of its list. The shuffled control writes another entity's state and is judged by the same words, so that what
the prompt or the words give away counts there too. A key word is generous: "ancient Greek philosopher" counts
for Alexander the Great. After the first run `king` was made a whole word: it had met "Kingdom".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import patchscope_nn as ps
from benchmarks.quality.cross_model import chosen, fit, fitted_on
from benchmarks.quality.intervals import Interval, interval, intervals
from benchmarks.quality.models import short
from benchmarks.quality.write import draw_curves, markdown, write_csv, write_page
from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.models import Model
from patchscope_nn.recipe import Recipe

#: Entities of the builtin data of two tokens or more, and stems of words that tell what each is.
KEYS = {
    "Diana, Princess of Wales": "royal princess wales",
    "Alexander the Great": r"macedon greek king\b conquer emperor general",
    "Muhammad Ali": "box fighter heavyweight",
    "Albert Einstein": "physic scientist relativity",
    "New York City": "city metropol",
    "Will Smith": "actor rapper film",
    "Queen Victoria": "queen monarch royal",
    "Isaac Newton": "physic mathematic scientist",
    "Charles Darwin": "natural biolog evolution scientist",
    "Thomas Edison": "invent",
    "William Shakespeare": "playwright poet dramat writer author",
    "Pablo Picasso": "painter artist cubis",
    "Julius Caesar": "roman general dictator emperor",
    "Nelson Mandela": "africa president apartheid",
    "Michael Jordan": "basketball",
    "Taylor Swift": "singer songwriter music",
    "South Korea": "country asia nation",
    "Mount Everest": "mountain peak",
    "Star Wars": "film movie fiction franchise",
    "The Beatles": "band rock music",
    "World War II": "war conflict",
    "blue whale": "whale mammal marine animal",
    "Harvard University": "university college school",
    "Manchester United": "football soccer club",
}
#: Where the state is written: the layer it was read from, and a fixed early one (code layer 4).
TARGETS = {"l* = l": "same", "l* = 4": 4}
TOKENS = 12


def run(model: Model, *, layers: str, count: int, work: Path, out: Path, command: str) -> None:
    """Describe entities from each layer, beside other entities' states, and write the texts and curves."""
    rows, name = _entities(count), short(model.info.name)
    tables = {
        label: sweep(_recipe(layers, at), (model, model), rows, work / f"entities-{at}-{name}")
        for label, at in TARGETS.items()
    }
    _write(
        tables,
        rows,
        file=out / "entity-description",
        title=f"Entity description (section 4.3): {model.info.name}",
        drawn=f"Entities resolved, {name}, {len(rows)} entities",
        about=f"{len(rows)} entities, {model.info.dtype}",
        command=command,
    )


def run_across(
    source: Model,
    target: Model,
    *,
    fit_on: Path,
    layers: Sequence[int],
    target_layers: Sequence[int],
    fitted: int,
    count: int,
    work: Path,
    out: Path,
    command: str,
) -> None:
    """Let one model describe another's states, through maps fitted on other texts."""
    rows, names = _entities(count), f"{short(source.info.name)} -> {short(target.info.name)}"
    affine = fit(source, target, texts=chosen(fit_on, fitted), layers=layers, target_layers=target_layers)
    said, tables = fitted_on(affine, fit_on, fitted), {}
    for at in target_layers:
        recipe = _recipe(list(layers), at).model_copy(update={"mapping": affine})
        folder = work / f"entities-{at}-{names.replace(' -> ', '-')}"
        tables[f"l* = {at}"] = sweep(recipe, (source, target), rows, folder)
    _write(
        tables,
        rows,
        file=out / "cross-model-entities",
        title=f"Entity description across models (section 4.4): {source.info.name} -> {target.info.name}",
        drawn=f"Entities resolved, {names}, {len(rows)} entities",
        about=f"{len(rows)} entities, {source.info.dtype} and {target.info.dtype}; {said}",
        command=command,
    )


def _entities(count: int) -> list[dict[str, Any]]:
    rows = [row for row in load_rows(DataSpec(builtin="entities")) if row["entity"] in KEYS]
    return sorted(rows, key=lambda row: list(KEYS).index(row["entity"]))[:count]


def _write(
    tables: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    *,
    file: Path,
    title: str,
    drawn: str,
    about: str,
    command: str,
) -> None:
    """Write the page of some tables, one for each l*, with its curves and numbers beside it."""
    found, curves, sections = [], {}, []
    for name, table in tables.items():
        real, shuffled = (_of(table, control) for control in (None, "shuffled"))
        read = sorted({int(layer) for layer in real["source_layer"]})
        for metric in ("resolved", "rouge_l"):
            for label, part in ((name, real), (f"{name}, shuffled", shuffled)):
                spans = intervals(_grid(part, rows, metric))
                found += [
                    {
                        "model": real["source_model"].iloc[0],
                        "target": name,
                        "control": "shuffled" if part is shuffled else "",
                        "metric": metric,
                        "layer": layer,
                        "n": len(rows),
                        **span._asdict(),
                    }
                    for layer, span in zip(read, spans, strict=True)
                ]
                if metric == "resolved":
                    curves[label] = (read, spans)
        sections.append(_section(name, real, shuffled, rows, read))
    write_csv(file.with_suffix(".csv"), found)
    draw_curves(file.with_suffix(".svg"), curves, title=drawn, y="share resolved (by key words)")
    alone = _of(next(iter(tables.values())), "unpatched")["text"].iloc[0]
    write_page(
        file.with_suffix(".md"),
        title=title,
        command=command,
        parts=[
            f"{about}, {TOKENS} tokens. The prompt alone says {alone!r}.\n",
            f"![Share resolved by layer]({file.name}.svg)\n",
            *sections,
            "## What is said\n",
            "The descriptions, cut where another item of the list begins; **bold** where a key word is in.\n",
            *(_texts(tables, number, row["entity"]) for number, row in enumerate(rows)),
        ],
    )


def _recipe(layers: str | list[int], target: Any) -> Recipe:
    """The recipe with one target layer."""
    changes = (
        f"source.layer={layers}",
        f"target.layer={target}",
        f"readout.generate.max_new_tokens={TOKENS}",
    )
    return ps.load_recipe("entity-description", sets=changes)


def sweep(recipe: Recipe, models: tuple[Model, Model], rows: list[dict[str, Any]], folder: Path) -> Any:
    """The table of a recipe; it goes on where an earlier call was stopped."""
    source, target = models
    return ps.run(
        recipe,
        source_model=source,
        target_model=target,
        data=rows,
        controls=["unpatched", "shuffled"],
        out=folder,
    ).table()


def description(text: str) -> str:
    """The description in a text: up to its line end or full stop, or the next item `, Name: ...`."""
    text = re.split(r"\.(?:\s|$)|\n", text.strip().removeprefix(":").strip())[0]
    before, colon, _ = text.partition(":")
    return (before.rpartition(",")[0] if colon else text).strip(" ,")


def resolves(text: str, entity: str) -> bool:
    """Whether the description in a text has a word that begins with one of the entity's key words."""
    return re.search(rf"\b(?:{'|'.join(KEYS[entity].split())})", description(text).lower()) is not None


def _of(table: Any, control: str | None) -> Any:
    return table[table["control"].isna() if control is None else table["control"] == control]


def _grid(table: Any, rows: Sequence[dict[str, Any]], metric: str) -> NDArray[np.float64]:
    """(n_rows, n_layers) of one metric."""
    if metric == "resolved":
        said = zip(table["text"], table["row"], strict=True)
        table = table.assign(resolved=[float(resolves(text, rows[row]["entity"])) for text, row in said])
    grid = table.pivot_table(index="row", columns="source_layer", values=metric)
    return np.asarray(grid.to_numpy(dtype=np.float64))


def _section(
    name: str, real: Any, shuffled: Any, rows: Sequence[dict[str, Any]], layers: Sequence[int]
) -> str:
    """One target layer: the best layer and any layer, for the state and its control, and every text."""
    own, other = (_grid(part, rows, "resolved") for part in (real, shuffled))
    rouge, other_rouge = (intervals(_grid(part, rows, "rouge_l")) for part in (real, shuffled))
    early = [place for place, layer in enumerate(layers) if layer <= layers[-1] * 2 // 3]
    scores = markdown(
        ["layer", "resolved", "resolved, shuffled", "ROUGE-L", "ROUGE-L, shuffled"],
        [
            [layer, *parts]
            for layer, *parts in zip(
                layers, intervals(own), intervals(other), rouge, other_rouge, strict=True
            )
        ],
    )
    return "\n".join(
        [
            f"## {name}\n",
            f"- At any layer: {_any(own)} resolved; shuffled {_any(other)}.",
            (
                f"- Mean over layers up to {layers[early[-1]]}: {interval(own[:, early].mean(axis=1))}; "
                f"shuffled {interval(other[:, early].mean(axis=1))}.\n"
            ),
            scores,
        ]
    )


def _any(grid: NDArray[np.float64]) -> Interval:
    return interval(grid.max(axis=1))


def _texts(tables: Mapping[str, Any], number: int, entity: str) -> str:
    """What is said of one entity: a row for each layer, with its own state and with another's."""
    said: dict[int, dict[str, str]] = {}
    for name, table in tables.items():
        for control in (None, "shuffled"):
            of = _of(table, control)
            of = of[of["row"] == number]
            label = name if control is None else f"another's state, {name}"
            for layer, text in zip(of["source_layer"], of["text"], strict=True):
                said.setdefault(int(layer), {})[label] = _shown(text, entity)
    labels = list(next(iter(said.values())))
    rows = [[layer, *(said[layer][label] for label in labels)] for layer in sorted(said)]
    return f"### {entity}\n\n{markdown(['l', *labels], rows)}"


def _shown(text: str, entity: str) -> str:
    cut = description(text) or "(nothing)"
    return f"**{cut}**" if resolves(text, entity) else cut
