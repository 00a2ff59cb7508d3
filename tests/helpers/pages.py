"""A browser that was never elsewhere."""

from contextlib import contextmanager


@contextmanager
def alone(browser, url: str):
    """A page on a phone, which asked for nothing else, had no trouble and is no wider."""
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    asked, troubles = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on("console", lambda message: troubles.append(message.text))
    tab.goto(url)
    assert [u for u in asked if not u.startswith("data:")] == [url]
    assert troubles == []
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    yield tab
    tab.close()
