"""The page of several runs in a real browser: it loads nothing, complains of nothing, and can be read."""

import os
from pathlib import Path
from typing import Any

import pytest
from tables import NASTY, make_table

from patchscope_nn.analysis.comparison import ComparedRun, compare
from patchscope_nn.report import Side, write_comparison

pytestmark = pytest.mark.browser
SHOTS = os.environ.get("PATCHSCOPE_SHOTS")  # a folder for screenshots, to look at
METRICS = ("precision_at_1", "surprisal_nats")
CONTROLS = ("unpatched", "random", "shuffled", "text-only")


def write(
    path: Path, *, best: tuple[str, ...] = (), names: tuple[str, ...] = ("token identity", "logit lens")
) -> Path:
    tables = {name: make_table(n_rows=12, controls=CONTROLS, seed=seed) for seed, name in enumerate(names)}
    compared = [
        ComparedRun(name=name, table=table, metrics=METRICS, best=best) for name, table in tables.items()
    ]
    manifest = {"recipe": {"name": "lenses"}, "models": {"source": {"name": "builtin:smollm2-135m-instruct"}}}
    sides = [
        Side(name=name, manifest=manifest, metrics=METRICS, first_cells=table, n_cells=len(table))
        for name, table in tables.items()
    ]
    return write_comparison(compare(compared), sides, path=path, title="Which lens sees it first?")


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Any:
    complaints: list[str] = []
    requests: list[str] = []
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: requests.append(request.url))

    def go(**options: Any) -> Any:
        page.goto(write(tmp_path / "comparison.html", **options).as_uri())
        page.locator(".figure").last.locator(".main-svg").first.wait_for()
        return page

    yield go
    page.wait_for_timeout(100)  # what comes late is counted too
    page.close()
    assert complaints == []
    assert set(requests) <= {(tmp_path / "comparison.html").as_uri()}


@pytest.mark.parametrize("best", [(), ("source_layer", "target_layer")])
def test_runs_stand_side_by_side(opened: Any, best: tuple[str, ...]) -> None:
    page = opened(best=best)
    for width in (1280, 420):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(250)  # the figures follow the page's width and colours
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            if SHOTS:
                name = f"comparison-{'best' if best else 'layers'}-{scheme}-{width}.png"
                page.screenshot(path=Path(SHOTS) / name, full_page=True)
    legend = " ".join(page.locator(".figure").first.locator(".legendtext").all_text_contents())
    assert "random (control)" in legend
    assert "token identity" in page.locator(".figure").first.text_content()
    tables = page.locator("section[aria-labelledby=differences-head] table")
    assert tables.count() == len(METRICS) + 1
    lines = tables.first.locator("tbody tr").all_inner_texts()
    assert [line.split("\t")[0] for line in lines] == ["token identity", "logit lens"]
    assert "144" in lines[1] or best
    answers = page.locator("#body tr td:nth-child(2)").all_inner_texts()
    assert answers[:4] == ["token identity", "logit lens"] * 2  # the same cell of each, beside one another


def test_cells_of_all_runs_are_searched_together(opened: Any) -> None:
    page = opened()
    page.fill("#search", "logit lens")
    page.locator("#found", has_text="of 456").wait_for()  # 12 rows x (12 layers x 3 kinds + 2)


def test_hostile_names_are_shown_as_text(opened: Any) -> None:
    page = opened(names=("a", "b " + NASTY.replace("\ud800", "")))
    assert "<script>alert(1)" in page.locator("section[aria-labelledby=differences-head]").inner_text()
    assert page.locator("b").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(opened: Any, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = opened()
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(250)  # the figures follow the page's colours
    serious = [
        (one["id"], one["help"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"])
        for one in Axe().run(page).response["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
