"""The pages of a study in a real browser: axe-core, keyboard, widths, requests, paper."""

import functools
import http.server
import re
import threading

import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers.pages import alone

pytestmark = pytest.mark.slow
VIEWS = [(1280, "light"), (944, "light"), (390, "dark")]
GRAVE = ("serious", "critical")
# a hyphen for a minus sign, a sign on nothing, words that say less than they seem to
WRONG = (r"(?<![\w.-])-\d", r"[+−]0\.0+\b(?!\d)", "cannot be told (to|apart)")
PROSE = """[...document.querySelectorAll('.bpo table, .bpo.say, .short, figcaption')]
    .map(e => e.innerText).join('\\n')"""
WIDER = """[...document.querySelectorAll('.scroll, .plot, .slider, .terms')]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))"""


@pytest.fixture(scope="module")
def pages(little_study):
    found = [little_study.parent / "index.html", *sorted(little_study.glob("*.html"))]
    assert len(found) == 8
    return found


def grave(page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['target']}" for v in found if v["impact"] in GRAVE]


def check(browser, files, width: int, scheme: str) -> None:
    """Nothing serious by axe-core, nothing wider than the window."""
    # axe-core is a script, which the pages themselves forbid
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme,
                                  bypass_csp=True)
    page = context.new_page()
    for file in files:
        page.goto(file.as_uri())
        text = page.evaluate("document.body.innerText")  # folded details are not in it
        assert len(re.findall(r"\d\.\d", text)) < 200, file.name
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        for wrong in WRONG:
            assert re.findall(wrong, page.evaluate(PROSE)) == [], (file.name, wrong)
        assert page.evaluate(WIDER) == [], file.name
        assert grave(page) == [], file.name
        assert page.evaluate("document.documentElement.scrollWidth") == width, file.name
    context.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_axe_has_nothing_serious_to_say_and_nothing_is_wider_than_the_page(browser, pages, width,
                                                                           scheme):
    check(browser, pages, width, scheme)


def test_axe_would_tell(browser):
    page = browser.new_page()
    page.set_content("<html><body><img src='data:,'><p style='color:#ccc'>faint</p></body></html>")
    assert {"image-alt", "color-contrast"} <= {v.split(":")[0] for v in grave(page)}
    page.close()


def test_a_page_asks_for_nothing_from_a_disk_or_a_host(browser, pages, little_study):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler,
                                directory=str(little_study.parent))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_port}"
    try:
        for file in pages:
            for url in (file.as_uri(), f"{host}/{file.relative_to(little_study.parent)}"):
                with alone(browser, url):
                    assert file.stat().st_size < 3_000_000
    finally:
        server.shutdown()


def test_headings_pictures_and_the_keyboard(browser, pages):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    for file in pages:
        page.goto(file.as_uri())
        levels = [int(t[1]) for t in page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.tagName)")]
        assert levels.count(1) == 1 and levels[0] == 1, file.name
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), file.name
        assert page.evaluate("[...document.images].every(i => i.alt.trim() && i.naturalWidth)")
        reached = set()
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.tagName"))
        assert "A" in reached, file.name
        if re.match(r"\d_", file.name):
            assert "SUMMARY" in reached, file.name
            page.locator("summary").first.focus()
            page.keyboard.press("Enter")
            assert page.evaluate("document.querySelector('details').open")
    page.close()


def test_a_page_opens_with_what_came_out_and_its_facts(browser, pages):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    for file in pages:
        if re.match(r"\d_", file.name):
            page.goto(file.as_uri())
            short, facts = page.locator(".short"), page.locator("dl.facts")
            assert short.count() == 1 and facts.count() == 1, file.name
            page.locator("details.run > summary").click()
            assert short.bounding_box()["y"] < facts.bounding_box()["y"] < 1200, file.name
            assert page.locator(".contents a").count() > 1 and page.locator(".terms dt").count()
            assert page.locator(".top .neighbours a").count() in (1, 2), file.name
            for told in ("seed", "differs from the defaults", "inputs", "versions", "commit"):
                assert told in facts.text_content(), file.name
    page.close()


def test_the_benchmarks_are_short_with_few_numbers_and_the_rest_folded(browser, pages):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(next(file for file in pages if file.name.startswith("5_")).as_uri())
    assert page.evaluate("document.documentElement.scrollHeight") < 6000
    shown = page.evaluate("document.body.innerText")
    assert len(re.findall(r"(?<![\w.])\d*\.\d+", shown)) < 200
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    every = page.evaluate("document.body.innerText")
    for word in ("licence", "p, Holm", "calibration error", "sft_compute", "arXiv"):
        assert word in every and word not in shown, word
    page.close()


def test_paper_is_light_and_holds_every_column(browser, pages):
    # A4 without its margins, in pixels
    page = browser.new_page(viewport={"width": 673, "height": 985}, color_scheme="dark")
    page.emulate_media(media="print")
    for file in pages:
        page.goto(file.as_uri())
        assert page.evaluate("matchMedia('print').matches")
        assert page.evaluate(
            "getComputedStyle(document.body).color") == "rgb(32, 36, 40)", file.name
        wide = page.evaluate("[...document.querySelectorAll('table, img')]"
                             ".filter(e => e.getBoundingClientRect().right > innerWidth + 24)"
                             ".map(e => e.innerText || e.alt)")
        assert wide == [], file.name
        assert page.pdf(format="A4").count(b"/Type /Page\n") >= 1
    page.close()
