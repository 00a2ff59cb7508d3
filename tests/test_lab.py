"""The notebooks in JupyterLab: a real server on loopback, a real browser, Run All from a fresh
kernel. What counts is the saved notebook, and a notebook that must fail shows that it would tell.
"""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from helpers import warm
from helpers.lab import PATIENCE, Lab, check, code_cells, edited, errors
from helpers.study import LITTLE

from bpo import params

pytestmark = pytest.mark.slow
STUDY = list(params.study_files("tiny"))


def with_parameters(notebook: Path, out: Path, **changes: object) -> None:
    """A copy of a notebook whose parameters cell was edited, as a user would."""
    copy = nbformat.read(notebook, 4)
    cell = next(c for c in copy.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = edited(cell.source, **changes)
    nbformat.write(copy, out)


# Notes every text of the notebook beside a bar, such as "... 4 of 10 steps, 3 s left; all in all".
WATCH_BARS = """() => {
  window.bars = new Set();
  new MutationObserver(() => {
    for (const bar of document.querySelectorAll(".jp-OutputArea-output progress"))
      window.bars.add(bar.parentElement.textContent);
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
# What is red, or a bar, in the open notebook.
LEFT = ".jp-OutputArea-output[data-mime-type*=stderr], .jp-OutputArea-output progress"


# Of how many lines each term of the facts is, in JupyterLab's own style.
LINES = """() => [...document.querySelectorAll(".jp-OutputArea-output .bpo dt bdi")]
  .map(term => [term.textContent, term.getClientRects().length])"""


def everything(saved: nbformat.NotebookNode) -> str:
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")
                     for c in saved.cells if c.cell_type == "code" for o in c.outputs)


def html_of(saved: nbformat.NotebookNode, cell_id: str) -> str:
    cell = next(c for c in saved.cells if c.id == cell_id)
    return "".join(o.get("data", {}).get("text/html", "") for o in cell.outputs)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, little_study, browser):
    root = tmp_path_factory.mktemp("lab")
    (root / "notebooks").mkdir()
    shutil.copytree(little_study, root / "outputs" / "little")
    # This one is computed in JupyterLab, the others are found there.
    shutil.rmtree(root / "outputs" / "little" / "1_noise_probability")
    for name in STUDY:
        fields = params.SCHEMAS[name].model_fields
        with_parameters(params.ROOT / "notebooks" / f"{name}.ipynb",
                        root / "notebooks" / f"{name}.ipynb", study="little",
                        **{n: v for n, v in LITTLE.items() if n in fields})
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    lab = Lab(root / "notebooks", root / "outputs", page, python=warm.python())
    try:
        yield lab
    finally:
        lab.close()
        page.close()


@pytest.mark.parametrize("name", [n for n in STUDY if not n.startswith(("1_", "4_"))])
def test_a_notebook_runs_whole_from_a_fresh_kernel(lab, name):
    made = lab.folder.parent / "outputs" / "little" / name / "manifest.json"
    file = lab.folder / f"{name}.ipynb"
    before, source = made.stat().st_mtime_ns, file.read_bytes()
    lab.open(name)
    saved = lab.run_all(name)
    check(saved)
    assert file.read_bytes() == source, "git would see a change"
    assert lab.page.locator(LEFT).count() == 0
    lines = lab.page.evaluate(LINES)
    assert lines and all(n == 1 for term, n in lines if len(term) < 20), lines
    # What is up to date is read again and not computed, whoever computed it.
    shown = [o.get("data", {}).get("text/plain", "")
             for c in saved.cells if c.cell_type == "code" for o in c.outputs]
    assert any("this run: up to date, read again" in text for text in shown)
    assert made.stat().st_mtime_ns == before and not list(made.parent.parent.glob("*.old-*"))
    assert any("data:image/" in o.get("data", {}).get("text/html", "")
               for c in saved.cells if c.cell_type == "code" for o in c.outputs)


def test_the_noise_can_be_moved_and_a_parameter_changed(lab):
    name = "1_noise_probability"
    lab.open(name)
    lab.page.evaluate(WATCH_BARS)
    saved = lab.run_all(name)
    check(saved)
    assert "noise step 500" in html_of(saved, "1-07b"), "the still figure is not in the file"
    made = lab.folder.parent / "outputs" / "little" / name / "manifest.json"
    assert len(json.loads(made.read_text())["metrics"]["p_true"]) == 3

    view = lab.page.locator(".jp-OutputArea-output:has(.widget-slider)")
    view.scroll_into_view_if_needed()
    picture = view.locator(".card img").nth(1)  # between the clean image and the last step
    picture.wait_for()
    before, told = picture.get_attribute("src"), view.inner_text()
    assert "At step 500, from the stored result." in told
    handle = view.locator("[role=slider]")
    for key in ("End", "ArrowLeft"):
        handle.press(key)
    lab.page.wait_for_function(
        "() => document.querySelector('.jp-OutputArea-output:has(.widget-slider)').innerText"
        ".includes('At step 998, computed just now by the model.')", timeout=PATIENCE * 1000)
    assert picture.get_attribute("src") != before
    assert "any other answer: " in told and "noise step 998" in view.inner_text()
    view.locator("select").select_option(index=1)
    lab.page.wait_for_function(
        "image => document.querySelector('.jp-OutputArea-output:has(.widget-slider) "
        ".card img').src != image", arg=view.locator(".card img").first.get_attribute("src"),
        timeout=PATIENCE * 1000)

    # A slip, the slip corrected, and back again, in the same kernel.
    source = code_cells(lab.folder / f"{name}.ipynb")[0].source
    lab.write_first(edited(source, noise_steps="[0, 9, 99, 400, 700, 999]").replace("seed", "sed"))
    slip = lab.run_all(name)
    assert "sed: no such parameter" in errors([c for c in slip.cells if "outputs" in c])[0]
    lab.write_first(edited(source, noise_steps="[0, 9, 99, 400, 700, 999]"))
    again = lab.run_all(name)
    check(again)
    assert len(json.loads(made.read_text())["metrics"]["p_true"]) == 6
    said = everything(again)
    assert "computed, since noise_steps [0, 500, 999] -> [0, 9, 99, 400, 700, 999]" in said
    assert "The report " in said and f"{name}.html is of another computation" in said
    bars = lab.page.evaluate("[...window.bars]")
    assert any(re.search(r"\d+ of \d+ rows, .* left; all in all \d+%, .* left", b) for b in bars)
    assert lab.page.locator(LEFT).count() == 0
    lab.write_first(source)
    back = lab.run_all(name)
    check(back)
    assert f"found again in {name}.old-1" in everything(back)
    assert len(json.loads(made.read_text())["metrics"]["p_true"]) == 3


def test_a_question_can_be_asked(lab):
    name = "4_qualitative_comparison"
    lab.open(name)
    saved = lab.run_all(name)
    check(saved)
    still = html_of(saved, "4-08")
    assert "data:image/" in still and "bpo_weaken" in still
    view = lab.page.locator(".jp-OutputArea-output:has(datalist)").first
    view.scroll_into_view_if_needed()
    before = view.locator("img").get_attribute("src")
    view.locator("select").select_option(index=3)
    lab.page.wait_for_function(
        "old => document.querySelector('.jp-OutputArea-output:has(datalist) img').src"
        " != old", arg=before, timeout=PATIENCE * 1000)
    offered = view.locator("datalist option").evaluate_all("all => all.map(o => o.value)")
    assert any(q.startswith("what color is the") for q in offered)
    question = next(q for q in offered if q.startswith("what color is the"))  # of this image
    view.locator("input[type=text]").fill(question)
    view.locator("input[type=text]").press("Enter")
    view.get_by_text("answered just now").wait_for(timeout=PATIENCE * 1000)
    assert question in view.inner_text().replace("\xa0", " ")
    assert view.locator(".chances").count() == 8
    clean = view.locator("img").get_attribute("src")
    view.locator("[role=slider]").press("End")
    view.get_by_text("answered just now, noise step 999").wait_for(timeout=PATIENCE * 1000)
    assert view.locator("img").get_attribute("src") != clean
    assert view.locator(".chances").count() == 8
    names = view.locator("p .label").all_inner_texts()
    assert names[-8:] == ["base", *params.DPOTraining().runs()]
    answers = view.locator("p > .label + span").all_inner_texts()
    assert len(list(filter(None, answers))) == len(names)


@pytest.mark.parametrize("broken", ["a misspelt parameter", "a cell in the middle"])
def test_a_notebook_that_fails_is_told(lab, broken):
    source = lab.folder / "2_pair_generation.ipynb"
    bad = nbformat.read(source, 4)
    cells = [c for c in bad.cells if c.cell_type == "code"]
    if broken == "a misspelt parameter":
        cells[0].source = cells[0].source.replace("seed = 0", "sed = 0")
    else:
        cells[3].source += "\nraise ValueError('this must be seen')"
    nbformat.write(bad, lab.folder / "broken.ipynb")
    lab.open("broken")
    saved = lab.run_all("broken")
    with pytest.raises(AssertionError):
        check(saved)
    told = errors([c for c in saved.cells if c.cell_type == "code"])
    assert len(told) == 1
    assert ("sed: no such parameter (did you mean seed?)" if broken.startswith("a mis")
            else "this must be seen") in told[0]


def test_nothing_is_asked_before_one_can_work(lab):
    # JupyterLab asks a newcomer about news a few seconds after it has started.
    lab.open("1_noise_probability")
    lab.page.wait_for_timeout(4000)
    assert lab.page.locator(".Toastify__toast, .jp-Dialog").count() == 0


def test_nothing_left_the_machine(lab):
    away = [url for url in lab.requests
            if not url.startswith((f"http://127.0.0.1:{lab.port}/", "data:", "blob:"))]
    assert len(lab.requests) > 100 and away == []
