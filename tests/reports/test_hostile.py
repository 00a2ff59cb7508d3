"""A data set and a model that say what would run, load or break a page if it were not text: a whole
study of them, its pages in a browser, its notebooks with their widgets in JupyterLab.
"""

import copy
import http.server
import json
import shutil
import subprocess
import threading

import nbformat
import pytest
import yaml
from helpers import warm
from helpers.data import picture
from helpers.lab import Lab, check
from helpers.models import WORDS, save
from helpers.study import command, environment
from tokenizers import AddedToken
from transformers import AutoProcessor, LlavaForConditionalGeneration

from bpo import params

pytestmark = pytest.mark.slow
NOTEBOOKS = ["1_noise_probability", "2_pair_generation", "3_dpo_training",
             "4_qualitative_comparison"]
LONG = "w" * 100_000
OWNED = "window.owned=(window.owned||0)+1"


class Leaks(http.server.ThreadingHTTPServer):
    """A host that must never be asked, and what it was asked."""

    def __init__(self):
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), self.Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass


@pytest.fixture(scope="module")
def leaks():
    server = Leaks()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def words(leaks) -> list[str]:
    """What must be text, without a space: words of the model as well as of the data."""
    host = f"http://127.0.0.1:{leaks.server_port}"
    return [f'<script>{OWNED};fetch("{host}/script")</script>',
            f'<img/src="{host}/image.png"/onerror="{OWNED}">',
            f'"\'><svg/onload="{OWNED}">', f'<iframe/src="{host}/frame">', "</td></table></div>",
            "</script><h1>large</h1>", "<!--", "$x^2$", r"\(y\)", r"$$\frac{1}{2}$$", "**bold**",
            "`code`", "```", "~~~", f"![p]({host}/markdown.png)", f"[a](javascript:{OWNED})",
            f"<{host}/auto>", "#", "|a|b|", "{{7*7}}", "{%raw%}", "{0.__class__}", "%s", "\x1b[31m",
            "\x00", "\x08", "\r", "\u202egnp", "\u2066", "\u05e9\u05dc\u05d5\u05dd", "&lt;b&gt;",
            "\\x41", "<style>*{display:none}</style>"]


@pytest.fixture(scope="module")
def hostile_model(model_folder, words, tmp_path_factory):
    """The random LLaVA with the hostile words in its vocabulary, and likely."""
    processor = AutoProcessor.from_pretrained(model_folder)
    model = LlavaForConditionalGeneration.from_pretrained(model_folder)
    processor.tokenizer.add_tokens([AddedToken(w, normalized=False) for w in words])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    ids = processor.tokenizer.convert_tokens_to_ids(words)
    head = model.get_output_embeddings().weight
    head.data[ids] = 2 * head.data[5:5 + len(WORDS)].repeat(2, 1)[:len(ids)]
    return save(model, processor, tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture(scope="module")
def hostile_data(data_file, words, tmp_path_factory):
    """The coloured discs, every string of them hostile: names, questions, answers, categories."""
    folder = tmp_path_factory.mktemp("hostile") / "rows"
    (folder / "images").mkdir(parents=True)
    rows = json.loads(data_file.read_text())
    truth = json.loads((data_file.parent / "truth.json").read_text())
    said = " ".join(words)
    names = {f"images/{n}.png": f"images/{n} <b onclick={OWNED}>$x$ `a` & 'q' \u202e.png"
             for n in range(4)}
    made, told = [], {}
    for n, row in enumerate(rows):
        row = copy.deepcopy(row)
        old, known = row["id"], copy.deepcopy(truth["rows"][row["id"]])
        row["id"] = f"{old} {words[n % len(words)]}"
        row["image"] = names[row["image"]]
        question, answer = row["conversations"]
        question["value"] = f"<image>\nwhat colour {said} {old}"
        answer["value"] = f"{words[n]} {answer['value']} {said if n % 2 else words[n + 12]}"
        if n == 0:
            question["value"], answer["value"] = f"<image>\n{LONG} {said}", f"{LONG} {said}"
        if known["category"] == "attribute":
            known |= {"true": [answer["value"]], "prior": [f"{words[n]} yellow {words[1]}"]}
        made.append(row)
        told[row["id"]] = known
    for n in range(4):
        picture("disc", "red", n).save(folder / names[f"images/{n}.png"])
    (folder / "rows.json").write_text(json.dumps(made))
    (folder / "truth.json").write_text(json.dumps(
        {"vocabulary": {"objects": {w: [w] for w in words if w.strip()}, "colours": words[:3]},
         "images": {names[k]: {"objects": [{"name": words[0], "colour": words[1], "cell": 0}]}
                    for k in truth["images"]}, "rows": told}))
    return folder / "rows.json"


@pytest.fixture(scope="module")
def study(hostile_model, hostile_data, prompt_files, tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    common = {"study": "hostile", "model": str(hostile_model)}
    made = {
        "1_noise_probability": {"data": str(hostile_data), "noise_steps": [0, 500, 999]},
        "2_pair_generation": {"data": str(hostile_data), "text_model": "", "weaken_samples": 2,
                              "max_new_tokens": 12, **prompt_files},
        "3_dpo_training": {"image_folder": str(hostile_data.parent), "steps": 2, "save_every": 1,
                           "methods": ["sft", "bpo"]},
        "4_qualitative_comparison": {"splits": {"held_out": str(hostile_data)}, "resamples": 100,
                                     "calibration_data": ""},
    }
    (root / "params" / "hostile").mkdir(parents=True)
    for name, values in made.items():
        (root / "params" / "hostile" / f"{name}.yaml").write_text(yaml.safe_dump(common | values))
    done = subprocess.run(command("run", "hostile"), cwd=params.ROOT, text=True,
                          capture_output=True, env={**environment(root / "outputs"),
                                                    "BPO_PARAMS": str(root / "params")})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "outputs" / "hostile"


def test_the_words_would_do_harm(browser, leaks, words):
    page = browser.new_page()
    for word in words[:4]:
        page.set_content(f"<p>{word}")
        page.wait_for_timeout(300)
        assert page.evaluate("window.owned") or "/frame" in word
    assert {"/script", "/image.png", "/frame"} <= set(leaks.asked)
    page.close()
    leaks.asked.clear()


def test_the_model_says_them(study, words):
    pairs = (study / "2_pair_generation" / "pairs.jsonl").read_text()
    answers = (study / "4_qualitative_comparison" / "answers-held_out.jsonl").read_text()
    said = [json.loads(line)["rejected"] for line in pairs.splitlines()]
    assert sum("<" in str(s) for s in said) >= len(said) / 2
    answered = " ".join(a for line in answers.splitlines()
                        for a in json.loads(line)["answers"].values())
    assert sum(w in answered for w in words) >= 5


def test_pages_show_text_and_nothing_else(browser, leaks, study, words):
    # Scripts are let through here: what must not run must not be there.
    context = browser.new_context(viewport={"width": 390, "height": 900}, bypass_csp=True)
    page = context.new_page()
    asked, troubles = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    files = [study.parent / "index.html", study / "index.html",
             *(study / f"{name}.html" for name in NOTEBOOKS)]
    seen = ""
    for file in files:
        asked.clear()
        page.goto(file.as_uri())
        page.wait_for_timeout(300)
        assert [u for u in asked if not u.startswith("data:")] == [file.as_uri()]
        assert page.evaluate("window.owned") is None, file.name
        count = page.evaluate("Object.fromEntries(['script', 'iframe', 'h1', 'main', 'footer'].map("
                              "n => [n, document.querySelectorAll(n).length]))")
        assert (count["script"], count["iframe"], count["h1"], count["main"]) == (0, 0, 1, 1)
        assert page.evaluate("document.documentElement.scrollWidth") == 390, file.name
        assert page.evaluate("document.querySelector('main').getBoundingClientRect().height") > 200
        assert file.stat().st_size < 3_000_000
        seen += page.evaluate("document.body.innerText")
    assert leaks.asked == [] and troubles == []
    shown = [w for w in words if w.isprintable() and w in seen]
    assert len(shown) == len([w for w in words if w.isprintable()])
    for spelt in (r"\x1b[31m", r"\x00", r"\x08", r"\u202egnp"):
        assert spelt in seen
    assert " more characters" in seen and "{{7*7}}" in seen
    context.close()


def test_notebooks_and_their_widgets_show_text_and_nothing_else(browser, leaks, study, tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in NOTEBOOKS:
        shutil.copy(study / f"{name}.ipynb", tmp_path / "notebooks" / f"executed-{name}.ipynb")
        fresh = nbformat.read(study / f"{name}.ipynb", 4)
        for cell in fresh.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(fresh, tmp_path / "notebooks" / f"{name}.ipynb")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    lab = Lab(tmp_path / "notebooks", study.parent, page, python=warm.python())

    def harmless(name):
        assert page.evaluate("window.owned") is None, name
        assert page.locator(".jp-OutputArea mjx-container, .jp-OutputArea iframe").count() == 0
        assert page.locator(".bpo script, .bpo h1").count() == 0

    try:
        for name in NOTEBOOKS:
            lab.open(f"executed-{name}")
            page.wait_for_timeout(500)  # typesetting starts when the outputs are there
            harmless("opened")
            if name[0] not in "14":  # those with widgets
                continue
            lab.open(name)
            # What the kernel sends is trusted: JupyterLab itself would run scripts in it.
            check(lab.run_all(name))
            page.wait_for_timeout(1000)
            harmless(name)
            if name.startswith("4_"):
                view = page.locator(".jp-OutputArea-output:has(.widget-text)").first
                view.scroll_into_view_if_needed()
                view.locator("select").last.select_option(index=2)
                view.locator("input[type=text]").fill(f"<img src=x onerror='{OWNED}'> $x^2$")
                view.locator("input[type=text]").press("Enter")
                view.get_by_text("answered just now").wait_for(timeout=400_000)
                assert "<img src=x" in view.inner_text()
                harmless("asked")
            if name.startswith("1_"):
                view = page.locator(".jp-OutputArea-output:has(.widget-slider)")
                view.scroll_into_view_if_needed()
                view.locator("select").select_option(index=1)
                view.get_by_text("from the stored result").wait_for()
                assert "<script>" in view.inner_text()
                harmless("moved")
    finally:
        lab.close()
    assert leaks.asked == [] and dialogs == []
