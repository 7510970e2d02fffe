"""The explorer's grid in a real browser: the layers stay in sight, and cut no column beside them."""

import os

import pytest
import tiny
from explorers import exploring, serving

pytestmark = pytest.mark.browser
SHOTS = os.environ.get("PATCHSCOPE_SHOTS")  # a folder for screenshots, to look at
LONG = " incomprehensibilities"
N_TOKENS = 24
#: How many columns the layers cut, whether the selected cell is in sight, and where the grid is scrolled to.
MEASURE = """() => {
  const edge = document.querySelector("#grid .corner").getBoundingClientRect().right;
  const heads = [...document.querySelectorAll("#grid thead th:not(.corner)")];
  const columns = heads.map((head) => head.getBoundingClientRect());
  const cut = columns.filter(({ left, right }) => left < edge - 1.5 && right > edge + 1.5).length;
  const box = document.querySelector("#scroll").getBoundingClientRect();
  const chosen = document.querySelector("#grid td[aria-selected=true]").getBoundingClientRect();
  const inSight = chosen.left >= edge - 1.5 && chosen.right <= box.right + 1;
  return { cut, inSight, scrolled: document.querySelector("#scroll").scrollLeft };
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    place = tmp_path_factory.mktemp("explorer")
    tokenizer = tiny.make_tokenizer(pieces=(*tiny.PIECES, LONG))
    module = tiny.make_module("llama")
    module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    module.config.max_position_embeddings = 4096
    module.save_pretrained(place)
    tokenizer.save_pretrained(place)
    with exploring(str(place)) as explorer, serving(explorer) as served:
        yield served


@pytest.fixture(params=[(1440, 900), (1280, 900), (700, 900)], ids=["1440", "1280", "700"])
def page(chromium, address, request):
    width, height = request.param
    context = chromium.new_context(viewport={"width": width, "height": height})
    opened = context.new_page()
    opened.goto(address)
    opened.locator(".panel .card[aria-busy=false] [role=status]", has_text=" s").wait_for()
    opened.fill("#prompt", LONG * N_TOKENS)
    opened.press("#prompt", "Enter")
    opened.locator("#grid-status", has_text=f"{N_TOKENS} tokens").wait_for()
    yield opened
    context.close()


def measured(page):
    page.wait_for_timeout(400)  # scrolling comes to rest
    return page.evaluate(MEASURE)


def test_the_layers_cut_no_column(page):
    last = measured(page)
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/grid-{page.viewport_size['width']}.png")
    assert last["scrolled"] > 0
    assert (last["cut"], last["inSight"]) == (0, True)
    for distance in (-130, -333, -77, 55):
        page.locator("#scroll").hover()
        page.mouse.wheel(distance, 0)
        assert measured(page)["cut"] == 0
    page.locator(f"#grid td[data-position='{N_TOKENS - 1}'][data-layer='1']").click()
    for key in ("ArrowLeft",) * 5 + ("Home", "ArrowRight", "End", "ArrowLeft"):
        page.keyboard.press(key)
        now = measured(page)
        assert (now["cut"], now["inSight"]) == (0, True)
    page.set_viewport_size({"width": 1133, "height": 900})
    assert measured(page)["cut"] == 0
