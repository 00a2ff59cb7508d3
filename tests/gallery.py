"""Pictures of a study's index for the README: `make gallery STUDY=tiny`. Beside each stand its
words, which tests/test_readme.py compares with the stored results.
"""

import io
import shutil
import sys

from PIL import Image
from playwright.sync_api import sync_playwright

from bpo.params import outputs_root

VIEWS = {"index": (1280, "light"), "index-phone": (390, "dark")}
MARGIN = 16  # pixels above and below
BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # those of the Makefile


def main(study: str) -> int:
    index, gallery = outputs_root() / study / "index.html", outputs_root() / "gallery"
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None or not index.is_file():
        print(f"make gallery needs Chromium and {index}: python -m bpo replicate {study}")
        return 1
    gallery.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (width, scheme) in VIEWS.items():
            page = started.new_page(viewport={"width": width, "height": 900},
                                    color_scheme=scheme)
            page.goto(index.as_uri())
            screen = page.locator(".screen")
            box = screen.bounding_box()
            around = {"x": 0, "y": box["y"] - MARGIN, "width": width,
                      "height": box["height"] + 2 * MARGIN}
            with Image.open(io.BytesIO(page.screenshot(clip=around, full_page=True))) as picture:
                picture.convert("RGB").save(gallery / f"{name}.webp", quality=78, method=6)
            (gallery / f"{name}.txt").write_text(f"{screen.inner_text()}\n", encoding="utf-8")
        started.close()
    print(*sorted(f"{f} {f.stat().st_size / 1e3:.0f} kB" for f in gallery.iterdir()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
