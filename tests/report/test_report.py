"""The report says what the table says, holds no markup of a model's, and is one small file."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from tables import NASTY, make_table

from patchscope_nn.analysis.statistics import best_over
from patchscope_nn.report import page as report_page
from patchscope_nn.report import run_html, write_report
from patchscope_nn.report.summary import summary as sentences_of

MANIFEST: dict[str, Any] = {
    "recipe": {
        "name": "next-token",
        "title": "Which next token does each layer hold?",
        "paper": "arXiv 2401.06102, section 4.1",
        "source": {"prompt": "{text}", "position": -1, "layer": "all"},
        "metrics": ["precision_at_1", "surprisal_nats"],
        "controls": ["unpatched", "random"],
    },
    "metrics": [{"name": "precision_at_1"}, {"name": "surprisal_nats", "higher_is_better": False}],
    "hash": "3f2a9c",
    "command": "patchscope run next-token --limit 20",
    "versions": {"patchscope_nn": "0.1.0", "nnsight": "0.8.1"},
    "timings": {"elapsed_s": 12.34},
    "seed": 0,
}


def write(table: pd.DataFrame, folder: Path, *, manifest: dict[str, Any] = MANIFEST) -> str:
    return write_report(table, manifest=manifest, path=folder / "report.html").read_text(encoding="utf-8")


def embedded(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def column(page: str, label: str) -> list[Any]:
    (found,) = [entry for entry in embedded(page, "cells")["columns"] if entry["label"] == label]
    pool = found.get("pool")
    return found["values"] if pool is None else [pool[index] for index in found["values"]]


def text(page: str, tag: str) -> str:
    found = re.search(rf"<{tag}[^>]*>(.*?)</{tag.partition(' ')[0]}>", page, flags=re.DOTALL)
    assert found
    return html.unescape(found[1])


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (["target_layer"], "(each row's best over target layer) is highest at source layer"),
        (["source_layer"], "(each row's best over source layer) is highest at target layer"),
        (
            ["source_layer", "target_layer"],
            "(each row's best over source layer and target layer) over all layers:",
        ),
    ],
)
def test_the_summary_of_a_best_has_the_controls_best(over: list[str], said: str) -> None:
    table = make_table(n_rows=6, layers=range(3), target_layers=range(4), controls=("unpatched", "random"))
    manifest = {"recipe": {"best_over": over}}
    (sentence,) = [
        one
        for one in sentences_of(table, manifest=manifest, metrics=["precision_at_1"])
        if one.startswith("Mean ")
    ]
    assert sentence.startswith(f"Mean precision_at_1 {said}")
    best = best_over(table, metric="precision_at_1", over=over)
    left = [name for name in ("source_layer", "target_layer") if name not in over]
    controls = best[best["control"] == "random"]
    means = controls.groupby(left)["precision_at_1"].mean() if left else [controls["precision_at_1"].mean()]
    assert any(f"random {mean:.3g}" in sentence for mean in means)
    assert "unpatched" in sentence


def test_summary_names_the_best_layer_and_its_controls(tmp_path: Path) -> None:
    table = make_table()
    page = write(table, tmp_path)
    summary = text(page, 'p class="summary"')
    means = table[table["control"].isna()].groupby("source_layer")["precision_at_1"].mean()
    unpatched = table[table["control"] == "unpatched"]["precision_at_1"].mean()
    assert "20 source prompts" in summary
    assert "500 cells over 20 data rows: 240 patched, and 20 unpatched and 240 random as controls" in summary
    assert f"highest at source layer {means.idxmax()}: {means.max():.3g} (95 % interval" in summary
    assert f"unpatched {unpatched:.3g}" in summary
    assert "failed" not in summary


def test_lower_surprisal_is_better_and_missing_controls_are_said(tmp_path: Path) -> None:
    manifest = {"metrics": [{"name": "surprisal_nats", "higher_is_better": False}]}
    page = write(make_table(controls=(), layers=range(-1, 5)), tmp_path, manifest=manifest)
    summary = text(page, 'p class="summary"')
    assert "6 layers (embed to 4)" in summary
    assert "Mean surprisal_nats is lowest at source layer" in summary
    assert "No control was run" in summary


@pytest.mark.parametrize("readout", ["next_token", "generate", "choices"])
def test_cells_hold_what_was_said(readout: str, tmp_path: Path) -> None:
    table = make_table(readout, n_rows=3)
    page = write(table, tmp_path)
    said = {"next_token": "top_tokens", "generate": "text", "choices": "choice"}[readout]
    answers = column(page, "answer")
    for answer, given in zip(answers, table[said], strict=True):
        assert (given[0].strip() if readout == "next_token" else given) in answer.replace("⏎", "\n")
    layers = column(page, "source layer")
    assert layers == [None if pd.isna(layer) else layer for layer in table["source_layer"]]


def cards_of(page: str) -> list[str]:
    found = re.findall(r'<article class="card">(.*?)</article>', page, flags=re.DOTALL)
    return [" ".join(html.unescape(re.sub("<[^>]*>", " ", card)).split()) for card in found]


def test_cards_show_the_best_text_its_reference_and_its_controls(tmp_path: Path) -> None:
    controls = ("unpatched", "random", "text-only")
    table = make_table("generate", n_rows=3, layers=range(4), controls=controls)
    table["text"] = [f"words {number}" for number in range(len(table))]
    manifest = {**MANIFEST, "references": [{"description": "an <i>icon</i>"}, {"description": "two"}]}
    page = write(table, tmp_path, manifest=manifest)
    said = cards_of(page)
    assert len(said) == 3
    assert "an <i>icon</i>" in said[0]
    assert "<i>icon" not in page
    assert "reference" not in said[2]
    real = table[(table["row"] == 0) & table["control"].isna()]
    best = real.loc[real["rouge_l"].idxmax()]
    assert f"layer {best['source_layer']}, best of 4 rouge_l {best['rouge_l']:.3g} {best['text']} " in said[0]
    own = table[(table["row"] == 0) & (table["control"] == "random")]
    beside = own[own["source_layer"] == best["source_layer"]].iloc[0]
    assert f"random layer {best['source_layer']} rouge_l {beside['rouge_l']:.3g} {beside['text']} " in said[0]
    assert said[0].count("words") == 4
    assert "references" not in text(page, 'pre id="manifest" tabindex="0"')
    assert cards_of(write(make_table(n_rows=2), tmp_path)) == []


def test_the_exact_command_and_each_control_are_told(tmp_path: Path) -> None:
    page = write(make_table(n_rows=2, controls=("unpatched", "text-only")), tmp_path)
    assert text(page, 'pre id="command" tabindex="0"') == MANIFEST["command"]
    told = re.findall(r"<dt>([^<]*) \(control\)</dt>", page)
    assert told == ["unpatched", "text-only"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"probe": {"label": "object"}}, "A linear probe read hidden states of"),
        ({"target": {"write": {"cut": {"position": 0}}}}, "attention from some tokens to others was cut"),
        ({"target": {"corrupt": {"noise": 3}}}, "target prompt with noise on some of its embeddings"),
        ({"source": {"site": "mlp"}}, "Outputs of MLPs of"),
    ],
)
def test_the_summary_says_what_was_done(recipe: dict[str, Any], said: str) -> None:
    table = make_table(n_rows=2)
    assert said in sentences_of(table, manifest={"recipe": recipe}, metrics=["precision_at_1"])[0]


@pytest.mark.parametrize(
    ("write", "said"), [({"cut": {"position": 0}}, "is highest at layer "), ({}, "at source layer ")]
)
def test_only_a_layer_that_is_read_is_called_a_source(write: dict[str, Any], said: str) -> None:
    manifest = {"recipe": {"target": {"write": write}}}
    *_, headline = sentences_of(make_table(), manifest=manifest, metrics=["precision_at_1"])
    assert said in headline


def test_the_best_scale_is_named(tmp_path: Path) -> None:
    table = make_table(n_rows=4, layers=range(3), scales=(0.5, 2.0))
    table.loc[(table["scale"] == 2.0) & table["control"].isna(), "precision_at_1"] = 1.0
    table.loc[(table["scale"] != 2.0) & table["control"].isna(), "precision_at_1"] = 0.0
    page = write(table, tmp_path)
    assert "highest at source layer 0 and scale 2: 1 (95 %" in text(page, 'p class="summary"')
    assert "n = 4 data rows" in text(page, 'p class="summary"')
    assert set(column(page, "scale")) == {0.5, 2}


def test_a_notebook_shows_a_run_without_a_script() -> None:
    for readout in ("next_token", "generate"):
        table = make_table(readout, n_rows=3)
        for name in ("text", "source_prompt"):
            if name in table:
                table[name] = pd.Series(NASTY, index=table.index, dtype=object)
        shown = run_html(table, table, manifest=MANIFEST, where="in <memory>")
        assert "in &lt;memory&gt;" in shown
        assert "<script" not in shown
        assert shown.count("<tr>") >= 1 + 12 + 1 + 3
        assert len(shown) < 30_000


def test_recipe_and_manifest_are_yaml(tmp_path: Path) -> None:
    page = write(make_table(n_rows=2), tmp_path)
    assert yaml.safe_load(text(page, 'pre id="recipe" tabindex="0"')) == MANIFEST["recipe"]
    manifest = yaml.safe_load(text(page, 'pre id="manifest" tabindex="0"'))
    assert manifest == {key: value for key, value in MANIFEST.items() if key != "recipe"}


def test_a_prompt_of_several_lines_is_written_as_recipes_write_it(tmp_path: Path) -> None:
    recipe = {"name": "a", "target": {"prompt": "cat -> cat\n?"}}
    page = write(make_table(n_rows=1), tmp_path, manifest={"recipe": recipe})
    assert r'prompt: "cat -> cat\n?"' in text(page, 'pre id="recipe" tabindex="0"')


def test_sinks_and_failures_are_marked(tmp_path: Path) -> None:
    table = make_table(n_rows=2, positions=(0, 3))
    table["error"] = ["out of memory" if i == 3 else None for i in range(len(table))]
    page = write(table, tmp_path)
    notes = column(page, "note")
    reads_zero = [list(position or [])[:1] == [0] for position in table["source_position"]]
    assert ["attention sink" in note for note in notes] == reads_zero
    assert notes[3].startswith("failed")
    assert "1 cell failed" in text(page, 'p class="summary"')


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    table = make_table("generate", n_rows=2, layers=range(3))
    for name in ("text", "source_prompt", "target_prompt", "source_model", "error"):
        table[name] = pd.Series(NASTY, index=table.index, dtype=object)
    table.loc[1:, "error"] = None
    table["source_token"] = [[NASTY] for _ in range(len(table))]
    recipe = {"name": NASTY, "title": NASTY, "metrics": ["rouge_l"]}
    page = write(table, tmp_path, manifest={"recipe": recipe, "command": NASTY, "versions": {NASTY: NASTY}})
    ours = page.replace(str(report_page.plotly_js()), "")
    assert "alert(1)" in ours  # it is there, as text
    assert "<script>alert" not in ours
    assert "<!--" not in ours
    assert "<b>" not in ours
    assert ours.count("</script>") == 4
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\u202e]", ours)
    assert all(len(answer) <= 4001 for answer in column(page, "answer"))


def test_markup_is_complete_and_asks_for_nothing(tmp_path: Path) -> None:
    page = write(make_table(n_rows=2), tmp_path)
    ours = page.replace(str(report_page.plotly_js()), "")
    assert page.startswith("<!doctype html>\n<html lang=")
    assert '<meta charset="utf-8">' in ours
    assert '<link rel="icon" href="data:,">' in ours
    assert page.count("plotly.js v") <= 1 < len(page) - len(ours)
    assert not re.search(r"""(src|href)=["'](?!data:)""", ours)
    assert len(embedded(page, "figures")) == ours.count('<div id="figure-')


def test_tolerates_a_bare_manifest_and_an_empty_table(tmp_path: Path) -> None:
    table = make_table(n_rows=1)
    assert "Patchscopes report" in write(table, tmp_path, manifest={})
    assert "no cells yet" in write(table.iloc[:0], tmp_path, manifest={})


def test_manifest_values_of_other_types_are_written(tmp_path: Path) -> None:
    odd = {"path": tmp_path, "number": np.float32(1.5), "tuple": (1, 2), "nan": float("nan")}
    assert str(tmp_path) in write(make_table(n_rows=1), tmp_path, manifest={"versions": odd})


def test_parquet_round_trip_writes_the_same_page(tmp_path: Path) -> None:
    table = make_table(n_rows=2)
    table.to_parquet(tmp_path / "cells.parquet")
    assert write(pd.read_parquet(tmp_path / "cells.parquet"), tmp_path) == write(table, tmp_path)


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write(make_table(n_rows=1), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_as_many_long_cells_as_a_page_lists_stay_under_8_mb(tmp_path: Path) -> None:
    table = make_table("generate", n_rows=49, layers=range(30))
    table["text"] = [f"{i} {'long text ' * 500}" for i in range(len(table))]
    assert len(table) == pytest.approx(report_page.MAX_CELLS, rel=0.01)
    path = write_report(table, manifest=MANIFEST, path=tmp_path / "new" / "report.html")
    assert path.stat().st_size < 8_000_000
    page = path.read_text(encoding="utf-8")
    assert len(column(page, "row")) == min(len(table), report_page.MAX_CELLS)


def test_a_huge_table_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "MAX_CELLS", 30)
    page = write(make_table(n_rows=2), tmp_path)
    assert len(column(page, "row")) == 30
    assert "the first 30 of 50 cells" in page
