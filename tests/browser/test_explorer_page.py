"""The explorer in a real browser: every step by mouse and by keys, and whatever a text may hold."""

import os
import re
import time
from pathlib import Path

import pytest
from explorers import exploring, save_model, serving
from tables import NASTY

import patchscope_nn as ps
from patchscope_nn.explore.views import CellView

pytestmark = pytest.mark.browser
SHOTS = os.environ.get("PATCHSCOPE_SHOTS")  # a folder for screenshots, to look at
PROMPT = "The Eiffel Tower is in the city"
N_TOKENS, N_LAYERS = 9, 4
HOSTILE = NASTY.replace("\ud800", "").replace("\x00", "")[:400]  # what a text field of a browser can hold


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def explorer(model):
    with exploring(model) as made:
        yield made


@pytest.fixture(scope="module")
def address(explorer):
    with serving(explorer) as served:
        yield served


class Opener:
    """Opens the page, and remembers what the browser complained of or asked for."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address
        self.complaints, self.requests, self.contexts = [], [], []

    def __call__(self, fragment="", *, width=1280, height=900, waits=True, **options):
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.contexts.append(context)
        return self.tab(context, fragment, waits=waits)

    def tab(self, context, fragment="", *, waits=True):
        page = context.new_page()
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(self.address + fragment)
        if waits:
            told(page)
        return page


@pytest.fixture
def opener(chromium, address):
    opened = Opener(chromium, address)
    yield opened
    for context in opened.contexts:
        context.close()
    assert opened.complaints == []
    assert all(url.startswith(address) for url in opened.requests)


def told(page):
    """Wait until the selected state is described, by all three."""
    page.locator(".panel .card[aria-busy=false] [role=status]", has_text=" s").wait_for()


def ask(page, prompt):
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.locator("#grid[aria-busy=true]").wait_for(state="detached")


def said(page, where=".panel"):
    kinds = {"patched": None, "unpatched": "unpatched", "random": "random"}
    return {
        control: page.locator(f"{where} .answer.{name}").first.inner_text() for name, control in kinds.items()
    }


def expected(view):
    rows = ps.run(CellView(**view).recipe()).rows
    return {row["control"]: row["text"].strip() or "(nothing)" for row in rows}


def cell(page, position, layer):
    return page.locator(f"#grid td[data-position='{position}'][data-layer='{layer}']")


def clip(page):
    return page.evaluate("navigator.clipboard.readText()")


def test_type_arrow_to_a_cell_and_read_what_it_is(opener, model):
    page = opener()
    ask(page, PROMPT)
    assert page.locator("#grid td").count() == N_TOKENS * N_LAYERS
    assert page.locator("#grid-status").inner_text().startswith(f"{N_TOKENS} tokens × {N_LAYERS} layers")
    cell(page, 8, 1).click()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    chosen = page.locator("#grid td[aria-selected=true]")
    assert chosen.get_attribute("aria-label").startswith("layer 2, position 6 ")
    page.locator("#panel-head", has_text="layer 2, position 6").wait_for()
    page.wait_for_timeout(300)  # a key asks only when it has come to rest
    told(page)
    view = {"prompt": PROMPT, "source_model": model, "target_model": model, "position": 6, "layer": 2}
    shown = said(page)
    assert {name: text.strip() for name, text in shown.items()} == expected(view)
    page.keyboard.press("Home")
    page.keyboard.press("PageDown")
    assert chosen.get_attribute("aria-label").startswith("layer 0, position 0 ")


def test_target_layer_and_prompt_can_be_changed(opener, model):
    page = opener()
    ask(page, PROMPT)
    cell(page, 3, 2).click()
    told(page)
    page.select_option("#into-layer", "0")
    page.locator(".where", has_text="layer 0").wait_for()
    page.fill("#into-prompt", "The {city} is in <b>x</b> of")
    page.fill("#into-position", "of")
    page.fill("#into-most", "5")
    page.get_by_role("button", name="Ask again").click()
    page.locator(".where", has_text="‘ of’").wait_for()
    target = {"prompt": "The {city} is in <b>x</b> of", "position": "of", "layer": 0}
    view = {"prompt": PROMPT, "source_model": model, "target_model": model, "position": 3, "layer": 2}
    found = {name: text.strip() for name, text in said(page).items()}
    assert found == expected({**view, "target": target, "max_new_tokens": 5})


@pytest.fixture
def slow(explorer):
    """Descriptions that never end; gives those who asked."""
    asked, answer = [], explorer.answers.cell

    def describe(_, one):
        asked.append(one)
        for count in range(1, 10_000):
            one.report("text", control=None, text="word " * count, n_tokens=count)
            time.sleep(0.02)

    explorer.answers.cell = describe
    yield asked
    explorer.answers.cell = answer


def test_a_description_streams_and_can_be_cancelled(opener, slow, explorer):
    page = opener(waits=False)
    page.locator(".answer.patched", has_text="word word").wait_for()
    assert page.locator(".panel progress").is_visible()
    page.get_by_role("button", name="Cancel").click()
    page.locator(".panel [role=status]", has_text="cancelled").wait_for()
    assert not page.locator(".panel progress").is_visible()
    deadline = time.monotonic() + 10
    while not slow[0].cancelled and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert slow[0].cancelled
    cell(page, 0, 0).click()  # another begins at once: the first holds nothing up
    page.locator(".answer.patched", has_text="word").wait_for()
    page.keyboard.press("Escape")
    page.locator(".panel [role=status]", has_text="cancelled").wait_for()


def test_a_state_that_is_pinned_while_it_is_asked_about_is_asked_about_once(opener, slow):
    page = opener(waits=False)
    page.locator(".answer.patched", has_text="word word").wait_for()
    page.get_by_role("button", name="Pin", exact=True).click()
    page.locator("#pins [role=status]", has_text="asking").wait_for()
    page.wait_for_timeout(200)
    assert len(slow) == 1
    page.locator(".panel").get_by_role("button", name="Cancel").click()  # then the pinned one asks itself
    page.locator("#pins .answer.patched", has_text="word").wait_for()
    assert len(slow) == 2
    page.keyboard.press("Escape")


def test_a_grid_can_be_cancelled(opener, explorer, monkeypatch):
    page = opener()
    answer = explorer.answers.grid

    def endless(view, one):
        for count in range(10_000):
            one.report("progress", done=count, total=10_000)
            time.sleep(0.02)
        answer(view, one)

    monkeypatch.setattr(explorer.answers, "grid", endless)
    page.fill("#prompt", PROMPT)
    page.press("#prompt", "Enter")
    page.locator("#grid-status", has_text="of 10000 cells").wait_for()
    page.locator("#grid-cancel").click()
    page.locator("#grid-status", has_text="cancelled").wait_for()
    assert page.locator("#grid td").count() == 0  # what is left on the page would be another prompt's
    monkeypatch.setattr(explorer.answers, "grid", answer)
    ask(page, PROMPT)
    assert page.locator("#grid td").count() == N_TOKENS * N_LAYERS


def test_copies_of_grid_and_state_run(opener, tmp_path):
    page = opener()
    ask(page, PROMPT)
    cell(page, 4, 1).click()
    told(page)
    page.locator(".grid-part").get_by_role("button", name="Copy as recipe").click()
    page.locator("#toast", has_text="Recipe copied").wait_for()
    (tmp_path / "grid.yaml").write_text(clip(page), encoding="utf-8")
    run = ps.run(tmp_path / "grid.yaml")
    tops = {(row["source_position"][0], row["source_layer"]): row["top_tokens"][0] for row in run.rows}
    assert len(tops) == N_TOKENS * N_LAYERS
    assert cell(page, 4, 1).get_attribute("title").startswith(f"‘{tops[4, 1]}’".replace("\n", "⏎"))
    page.locator(".panel").get_by_role("button", name="Copy as Python").click()
    page.locator("#toast", has_text="Python copied").wait_for()
    ran = {}
    exec(compile(clip(page), "copied.py", "exec"), ran)  # noqa: S102 (that it runs is what is tested)
    texts = {row["control"]: row["text"].strip() or "(nothing)" for row in ran["run"].rows}
    assert texts == {name: text.strip() for name, text in said(page).items()}


def test_a_link_holds_the_view(opener, address):
    page = opener()
    ask(page, PROMPT + " of 'Paris' & {x}")
    page.select_option("#lens", "logit-lens")
    page.locator("#grid[aria-busy=true]").wait_for(state="detached")
    page.select_option("#shade", "entropy")
    cell(page, 2, 3).click()
    told(page)
    page.select_option("#into-layer", "1")
    page.locator(".where", has_text="layer 1").wait_for()
    page.get_by_role("button", name="Pin").click()
    cell(page, 5, 0).click()
    page.locator("#pins .card[aria-busy=false]").wait_for()
    told(page)

    def seen(one):
        one.locator("#pins .card[aria-busy=false] [role=status]", has_text=" s").wait_for()
        told(one)
        parts = ["#prompt", "#lens", "#shade"]
        tables = one.locator("#grid").inner_text(), one.locator("#legend-high").inner_text()
        values = [one.locator(part).input_value() for part in parts]
        return values, tables, one.locator("#panel-head").inner_text(), said(one), said(one, "#pins")

    before = seen(page)
    assert before[0][1:] == ["logit-lens", "entropy"]
    page.reload()
    assert seen(page) == before
    page.locator("#copy-link").click()
    page.locator("#toast", has_text="copied").wait_for()
    link = clip(page)
    assert link.startswith(address)
    assert address.split("/")[3] not in link.split("#")[1]  # the part to share holds no token
    assert seen(opener("#" + link.split("#")[1])) == before
    page.locator("#copy-command").click()
    page.locator("#toast", has_text="Command copied").wait_for()
    assert clip(page).startswith("patchscope explore --model ")
    assert f"--view '{link.split('#')[1]}'" in clip(page)


def test_the_command_line_gives_a_view_to_begin_with(chromium, model):
    view = 'prompt=The+city&shade=entropy&at={"position":1,"layer":3}&pins=nonsense'
    with exploring(model, view=view) as made, serving(made) as served:
        page = chromium.new_page()
        page.goto(served)
        page.locator("#panel-head", has_text="layer 3, position 1").wait_for()
        assert page.input_value("#shade") == "entropy"
        page.close()


def test_two_states_are_pinned_side_by_side(opener):
    page = opener()
    ask(page, PROMPT)
    for layer in (1, 2):
        cell(page, 3, layer).click()
        told(page)
        page.get_by_role("button", name="Pin", exact=True).click()
    cards = page.locator("#pins .card")
    assert cards.count() == 2
    assert page.get_by_role("button", name="Pin", exact=True).is_disabled()
    left, right = (cards.nth(place).bounding_box() for place in range(2))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert page.locator("#grid td.pinned").count() == 2
    cards.first.get_by_role("button", name="Unpin").click()
    assert "layer 2" in cards.inner_text()


def test_models_are_switched_and_errors_are_messages(opener, tmp_path):
    page = opener()
    page.fill("#target-model", "no-such/model")
    page.press("#target-model", "Enter")
    page.locator("#error", has_text="no-such/model").wait_for()
    assert "Traceback" not in page.locator("#error").inner_text()
    assert page.locator("#grid td").count() == 0
    page.fill("#target-model", save_model(tmp_path, seed=1))
    page.press("#target-model", "Enter")
    page.locator("#grid td").first.wait_for()
    assert not page.locator("#error").is_visible()
    told(page)
    page.select_option("#shade", "surprisal")
    assert page.locator("#legend-name").inner_text() == "Surprisal needs one model for source and target"
    page.fill("#into-position", "Atlantis")
    page.get_by_role("button", name="Ask again").click()
    page.locator(".panel .error", has_text="'Atlantis' does not occur in").wait_for()


def test_hostile_text_is_shown_as_text(opener, explorer, monkeypatch):
    page = opener()

    def speak(view, one):
        for control in (None, "unpatched", "random"):
            one.report("text", control=control, text=NASTY, n_tokens=1)
            place = {"target_layer": 0, "target_token": [NASTY[:60]], "target_position": [0]}
            one.report("answer", control=control, text=NASTY, stopped="length", **place)

    monkeypatch.setattr(explorer.answers, "cell", speak)
    ask(page, HOSTILE)
    page.locator(".answer.patched", has_text="</script><script>alert(1)").wait_for()
    shown = page.locator(".answer.patched").inner_text()
    assert "<b>bold</b> %{y} 🙂 שלום \\u202e\\u0000\\u001b\\ud800" in shown
    assert page.locator("#grid b, .panel b, script:not([src])").count() == 0
    assert "\u202e" not in page.locator("body").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    told(page)
    page.reload()
    page.locator("#grid td").first.wait_for()
    assert page.input_value("#prompt") == HOSTILE
    for form, mark in (("recipe", "source:"), ("Python", "ps.run(")):
        page.locator(".grid-part").get_by_role("button", name=f"Copy as {form}").click()
        page.locator("#toast", has_text=re.compile(f"{form} copied", re.IGNORECASE)).wait_for()
        assert mark in clip(page)


def test_a_prompt_of_ten_thousand_characters_is_shown_in_parts(opener):
    page = opener()
    ask(page, "The city of Paris. " * 527)
    assert page.locator("#grid td").count() == 40 * N_LAYERS
    page.locator("#grid-status", has_text="0–39 of ").wait_for()
    page.get_by_role("button", name="Later tokens").click()
    page.locator("#grid-status", has_text="40–79 of ").wait_for()
    told(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_keys_alone_do_everything(opener):
    page = opener()
    page.locator("#prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    page.locator("#grid-status", has_text=f"{N_TOKENS} tokens").wait_for()

    def tab_to(selector):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.locator(f"{selector}:focus").count():
                return
        raise AssertionError(f"Tab does not come to {selector}")

    tab_to("#lens")
    page.keyboard.press("ArrowDown")
    page.locator("#grid[aria-busy=true]").wait_for(state="detached")
    tab_to("#grid td")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    told(page)
    assert page.locator("#grid td:focus").count() == 1
    tab_to(".panel button")
    page.keyboard.press("Enter")
    page.locator("#pins .card").wait_for()
    tab_to("#into-layer")


def test_two_tabs_at_once_both_work(opener):
    page = opener()
    other = opener.tab(page.context)
    for one, prompt in ((page, PROMPT), (other, "Diana is in Paris")):
        one.fill("#prompt", prompt)
        one.press("#prompt", "Enter")
    page.locator("#grid-status", has_text=f"{N_TOKENS} tokens").wait_for()
    other.locator("#grid-status", has_text=" tokens").wait_for()
    for one in (page, other):
        told(one)
    assert page.locator("#panel-head").inner_text() != other.locator("#panel-head").inner_text()


def test_when_the_server_is_gone_the_page_says_so(chromium, explorer):
    with serving(explorer) as served:
        page = chromium.new_page()
        page.goto(served)
        told(page)
    page.fill("#prompt", PROMPT)
    page.press("#prompt", "Enter")
    page.locator("#error", has_text="cannot be reached").wait_for()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "scale"), [(1280, 1), (640, 2)])  # 640 at 2 is 1280 at 200 %
def test_it_is_accessible_in_light_and_dark_and_at_200_percent(opener, scheme, width, scale):
    from axe_playwright_python.sync_playwright import Axe

    page = opener(width=width, height=900 // scale, color_scheme=scheme, device_scale_factor=scale)
    ask(page, PROMPT)
    told(page)
    page.get_by_role("button", name="Pin", exact=True).click()
    page.locator("#pins .card[aria-busy=false]").wait_for()
    page.select_option("#lens", "own")
    page.locator("#grid[aria-busy=true]").wait_for(state="detached")
    told(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = Axe().run(page).response["violations"]
    serious = [
        (one["id"], one["help"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"explore-{scheme}-{width}.png", full_page=True)


def test_the_scale_is_named_and_its_ink_can_be_read(opener):
    page = opener()
    ask(page, PROMPT)
    assert "cividis" in page.locator("#legend").inner_text()
    colours = page.eval_on_selector_all(
        "#grid td", "nodes => nodes.map(node => [node.style.color, node.style.backgroundColor])"
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for pair in colours:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
