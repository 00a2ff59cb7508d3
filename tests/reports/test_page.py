"""Pages, figures and cards: offline, escaped, readable; a failed run is a report too."""

import html.parser
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas
import pytest
from helpers.pages import alone
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from bpo.pairs.methods import meanings
from bpo.params import ROOT, NoiseProbability
from bpo.reports import cards, figures
from bpo.reports import page as report
from bpo.reports.template import executed as template
from bpo.study.results import Estimate

HOSTILE = ("<script>alert(1)</script> **bold** $x^2$ `code` <img src='http://192.0.2.1/x.png'> "
           "\x00\x1b[31m \u202egnp \u05e9\u05dc {value} & \"q\"")
CURVE = {"mean": [0.9, 0.2], "low": [0.8, 0.1], "high": [1.0, 0.3]}
HISTORY = [{"step": s, "loss": 1 / s, "rewards/margins": s, "rewards/accuracies": 0.5,
            "chosen": -5.0, "rejected": -5.0 - s} for s in (1, 2, 3)]
ROWS = pandas.DataFrame([
    {"method": m, "label": k, "value": 0.1, "low": low, "high": 0.2}
    for m, low in (("SFT", -0.1), (HOSTILE, 0.05)) for k in ("accuracy", "yes share")])


def picture(width: int = 64) -> Image.Image:
    image = Image.new("RGB", (width, width), "white")
    image.paste("red", (8, 8, 30, 30))
    return image


def all_figures() -> dict[str, object]:
    return {
        "strip": figures.noise_strip([picture()] * 7, list(range(7)), [HOSTILE] * 7),
        "curves": figures.noise_curves({"": {"a": CURVE, "$b$": CURVE}}, [0, 900], "probability"),
        "training": figures.training_curves({"BPO": HISTORY, "SFT": [{"step": 1, "loss": 2.0}]}),
        "differences": figures.differences({HOSTILE: ROWS}),
        "forest": figures.differences({n: ROWS.assign(label=["seed 0", "seed 1", HOSTILE, "mean"])
                                       for n in (HOSTILE, "cover")}),
    }


def shown_objects() -> list[cards.Shown]:
    return [
        *(report.figure(fig, alt=f"{name} {HOSTILE}", caption=HOSTILE)
          for name, fig in all_figures().items()),
        report.table(pandas.DataFrame({"text": [HOSTILE], "n": [3]}), HOSTILE, note=HOSTILE),
        report.say("The answer is **{answer}** (p < 0.05)", answer=HOSTILE),
        report.facts({HOSTILE: HOSTILE, "seed": 0}),
        report.folded(HOSTILE, report.say("{x}", x=HOSTILE)),
        cards.pair_gallery([{
            "image": picture(), "noised": picture(300), "question": HOSTILE, "chosen": "a red box",
            "category": HOSTILE, "rejected": [{"source": HOSTILE, "text": HOSTILE}]}]),
        cards.comparison_gallery([{
            "image": picture(), "question": HOSTILE, "truth": HOSTILE, "usual": HOSTILE,
            "origin": "drawn", "answers": {
                "base": {"text": HOSTILE, "wrong": set()},
                HOSTILE: {"text": HOSTILE, "wrong": {"code"}, "kind": "prior",
                          "chances": (0.25, 0.5)}}}]),
        cards.strips([{"title": HOSTILE, "note": HOSTILE, "share": 0.5, "of": HOSTILE, "examples": [
            {"image": picture(), "parts": [(HOSTILE, True)]}, {"image": None, "parts": []}]}],
            key=HOSTILE),
        cards.stacked_bars({HOSTILE: {"true": 0.5, "other": 0.5}},
                           {"true": HOSTILE, "other": HOSTILE}),
        cards.sample_gallery([{"image": picture(), "lines": [HOSTILE]}]),
    ]


def code(source: str, *outputs: object, tags: tuple[str, ...] = (), count: int = 1):
    return new_code_cell(source, execution_count=count, metadata={"tags": list(tags)},
                         outputs=list(outputs))


def stream(name: str, text: str):
    return new_output("stream", name=name, text=text)


def display(**data: str):
    return new_output("display_data", data={k.replace("__", "/"): v for k, v in data.items()})


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    notebook = new_notebook(cells=[
        new_markdown_cell(r"# The *tiny* run" "\n\n" r"Inline $\frac{a}{b}$, `$code$`, broken "
                          r"$\frac$, $\sqrt{a$ and $\nosuch{x}$." "\n\n"
                          "$$\\begin{aligned} a &= b \\\\ c &= d\\end{aligned}$$\n\n"
                          "![elsewhere](http://192.0.2.1/a.png)\n\n## Next"),
        code("beta = 0.1  # strength", tags=("parameters",)),
        code("beta = 0.3", tags=("injected-parameters",)),
        code("import bpo", tags=("setup",)),
        code("print('<b>')", stream("stdout", "<b>kept</b> \x1b[32mgreen\x1b[0m\n"),
             stream("stderr", "a secret warning"), stream("stderr", "\r 50%|##   | 1/2"),
             display(text__html="<progress value='1'></progress> of training"),
             new_output("execute_result", data={"text/plain": "{'a': '<i>'}"}),
             display(image__png="AAAA")),
        *(code("show()", display(text__html=s._repr_html_(), text__plain=repr(s)))
          for s in shown_objects()),
    ])
    nbformat.write(notebook, folder / "3_run.ipynb")
    return report.html_page(folder / "3_run.ipynb")


class Elements(html.parser.HTMLParser):
    """Every element of a page as (name, attributes), and the text outside style."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.lasttag != "style":
            self.words.append(data)

    def all(self, name: str) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.elements if tag == name]


@pytest.mark.study
def test_page_loads_nothing_and_runs_nothing(page):
    text = page.read_text(encoding="utf-8")
    parsed = Elements(text)
    assert page == page.parent / "3_run.html"
    assert sorted(p.name for p in page.parent.iterdir()) == ["3_run.html", "3_run.ipynb"]
    for tag, attrs in parsed.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        assert attrs.get("src", "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attrs)
    assert [link["href"] for link in parsed.all("link")] == ["data:,"]
    assert not re.search(r"url\(|@import", text)
    assert report.failure_message(page.with_suffix(".ipynb")) is None
    assert report.headline(page.with_suffix(".ipynb")) == (
        f"The answer is {HOSTILE} (p < 0.05)")
    assert report.plain("\x1b[1;31mred\x1b[0m\n") == "red\n"
    assert "default-src 'none'" in parsed.all("meta")[1]["content"]
    assert len(parsed.all("style")) == 1  # that of the outputs is not repeated


@pytest.mark.study
def test_page_structure(page):
    text = page.read_text(encoding="utf-8")
    parsed = Elements(text)
    assert "<title>The tiny run</title>" in text
    assert parsed.all("html") == [{"lang": "en"}]
    assert [t for t, _ in parsed.elements if re.fullmatch("h[1-6]", t)] == ["h1", "h2"]
    assert {"href": "index.html"} in parsed.all("a")
    assert all(image["alt"].strip() for image in parsed.all("img"))
    folds = re.findall(r"<details class=\"code\"><summary>(.+?)</summary>", text)
    assert folds[:5] == ["parameters and their defaults", "parameters of this run", "setup",
                         "code", "code"]
    assert "beta" not in re.sub(r"<details.*?</details>", "", text, flags=re.S)
    assert not any("open" in fold for fold in parsed.all("details"))


@pytest.mark.study
def test_formulas_become_mathml_or_stay_readable(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<math ") == 2
    assert "<mfrac><mi>a</mi><mi>b</mi></mfrac>" in re.sub("</?mrow>", "", text)
    assert 'display="block"' in text and text.count("<mtr>") == 2
    for left in (r"\frac", r"\sqrt{a", r"\nosuch{x}", "$code$"):
        assert f"<code>{left}</code>" in text


@pytest.mark.study
def test_outputs_are_text_without_progress(page):
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;kept&lt;/b&gt; green" in text
    assert "{&#39;a&#39;: &#39;&lt;i&gt;&#39;}" in text
    for gone in ("secret warning", "50%|", "<progress", "\x1b", "\x00", "\u202e"):
        assert gone not in text


@pytest.mark.parametrize("shown", shown_objects(), ids=lambda s: s.plain.split(":")[0][:12])
def test_hostile_text_is_only_text(shown):
    parsed = Elements(shown.html)
    assert "mathjax_ignore" in parsed.elements[0][1]["class"]  # JupyterLab typesets no `$x^2$`
    assert {tag for tag, _ in parsed.elements} <= {
        "div", "figure", "figcaption", "img", "table", "caption", "thead", "tbody", "tr", "th",
        "td", "p", "strong", "dl", "dt", "dd", "bdi", "span", "mark", "details", "summary"}
    assert all(image["src"].startswith("data:image/") for image in parsed.all("img"))
    words = "".join(parsed.words)
    assert r"<script>alert(1)</script> **bold** $x^2$ `code` <img src='http" in words
    assert r"\x00\x1b[31m \u202egnp" in words and "{value} & \"q\"" in words


def test_failed_run_is_a_report(tmp_path):
    error = new_output("error", ename="Refusal", evalue="\x1b[1;31m2 problems\x1b[0m: <bta> & rank",
                       traceback=["\x1b[0;31m----\x1b[0m", "\x1b]8;;x\x07in line 3"])
    note = new_markdown_cell("An Exception was encountered",
                             metadata={"tags": ["papermill-error-cell-tag"]})
    nbformat.write(new_notebook(cells=[note, code("1", count=1), code("fail()", error, count=7)]),
                   tmp_path / "bad.ipynb")
    text = report.html_page(tmp_path / "bad.ipynb").read_text()
    words = "".join(Elements(text).words)
    assert re.search(r"This run failed in cell 7:\s+2 problems: <bta> & rank", words)
    assert words.index("This run failed") < words.index("fail()")
    assert text.count('id="failed"') == 1 and 'href="#failed"' in text
    assert "in line 3" in words and "[1;31m" not in text and "\x1b" not in text
    assert "Exception was encountered" not in text
    assert report.failure_message(tmp_path / "bad.ipynb") == "2 problems: <bta> & rank"
    assert report.headline(tmp_path / "bad.ipynb") == ""


def test_clean_notebook_takes_out_progress_and_folders_only(tmp_path):
    path = tmp_path / "a.ipynb"
    widget = new_output("display_data", data={
        "application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "bar"})
    kept = [stream("stdout", "windows\r\nlines"), stream("stderr", "a warning")]
    notebook = new_notebook(cells=[code("x = 1", stream("stderr", "\r10%"), widget, *kept)],
                            metadata={"widgets": {"state": {}}, "kept": 1, "papermill": {
                                "input_path": f"{tmp_path}/b.ipynb", "output_path": str(path)}})
    nbformat.write(notebook, path)
    report.clean_notebook(path)
    after = nbformat.read(path, as_version=4)
    assert after.cells[0].outputs == kept
    assert after.metadata == {"kept": 1, "papermill": {"input_path": "b.ipynb",
                                                       "output_path": "a.ipynb"}}
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def executed(outputs, tmp_path, monkeypatch):
    """An executed notebook 1, cleaned, in a project and a study of small files."""
    files = {"bpo/a.py": "x = 1", "bpo/b.css": "p {}", "notebooks/1_noise_probability.ipynb": "{}",
             "outputs/tiny/1_noise_probability/manifest.json": "{}"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(template, "ROOT", tmp_path)
    path = outputs / "tiny" / "1_noise_probability.ipynb"
    nbformat.write(new_notebook(cells=[code("1", stream("stdout", "one"))]), path)
    report.clean_notebook(path, NoiseProbability())
    return path


def test_a_notebook_bears_the_stamp_of_what_it_was_made_from(executed, tmp_path):
    p = NoiseProbability()
    assert report.bears_stamp(executed, p)
    assert not report.bears_stamp(executed, NoiseProbability(draws=3))
    for name in ("bpo/a.py", "bpo/b.css", "notebooks/1_noise_probability.ipynb",
                 "outputs/tiny/1_noise_probability/manifest.json",
                 "outputs/tiny/1_noise_probability.ipynb"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(before.replace("one", "two") if "one" in before else "other")
        assert not report.bears_stamp(executed, p), name
        (tmp_path / name).write_text(before)
        assert report.bears_stamp(executed, p)
    (tmp_path / "bpo" / "new.py").touch()
    assert not report.bears_stamp(executed, p)


def test_a_notebook_without_a_stage_bears_no_stamp(executed, tmp_path):
    (executed.with_suffix("") / "manifest.json").unlink()
    report.clean_notebook(executed, NoiseProbability())
    assert not report.bears_stamp(executed, NoiseProbability())


def test_index_lists_and_escapes(tmp_path):
    folder = tmp_path / "a study"
    folder.mkdir()
    entries = [
        {"name": "0", "title": HOSTILE, "status": "complete", "headline": HOSTILE, "seconds": 75,
         "html": folder / "0 a.html", "ipynb": "0.ipynb", "manifest": "0/manifest.json"},
        {"name": "1", "title": "Two", "status": "failed", "headline": None, "seconds": 3725.2,
         "html": "1.html", "message": "\x1b[31mbad\x1b[0m <b>"},
    ]
    text = report.index_page(folder, entries).read_text(encoding="utf-8")
    parsed = Elements(text)
    assert [a["href"] for a in parsed.all("a")] == [
        "../index.html", "0%20a.html", "0%20a.html", "0.ipynb", "0/manifest.json", "1.html",
        "1.html"]
    words = re.sub(r"\s+", " ", "".join(parsed.words))
    assert "Study a study 1 complete, 1 failed" in words
    assert [words.count(w) for w in ("1 min 15 s", "1 h 2 min", "bad <b>")] == [1] * 3
    assert not parsed.all("script") and not parsed.all("img") and "\x1b" not in text
    assert words.count("<script>alert(1)</script>") == 2


@pytest.mark.study
def test_figures_are_the_same_bytes_each_time():
    for first, second in zip(all_figures().items(), all_figures().items(), strict=True):
        (name, one), (_, two) = first, second
        shown = report.figure(one, alt=name, caption=name).html
        assert shown == report.figure(two, alt=name, caption=name).html, name
        assert len(shown) > 5000, name


def test_figures_show_what_was_measured():
    training = figures.training_curves({"BPO": HISTORY, "SFT": [{"step": 1, "loss": 2.0}]})
    loss, margin, _, change = training.axes
    assert [len(axes.lines) for axes in (loss, margin, change)] == [2, 1, 2]
    assert [list(line.get_ydata()) for line in change.lines] == [[-5, -5, -5], [-6, -7, -8]]
    apart = figures.differences({"SFT - base": ROWS})
    dots = [line for line in apart.axes[0].lines if line.get_marker() == "o"]
    fills = [dot.get_markerfacecolor() for dot in dots]
    assert fills[0] == "white" and fills[2] != "white"
    # better lies right, whatever its sign
    (panel,) = figures.differences({"CHAIRi": ROWS[2:3].assign(more_is_better=False)}).axes
    assert [list(line.get_xdata()) for line in panel.lines[1:]] == [[-0.2, -0.05], [-0.1]]
    assert [text.get_text() for text in panel.texts] == ["+0.100"]
    strip = figures.noise_strip([picture()] * 3, [0, 5, 9], ["$x^2$"] * 3)
    assert not strip.axes[0].xaxis.label.get_parse_math()  # `$x^2$` is drawn as it is
    assert [axes.get_title() for axes in strip.axes] == ["step 0", "step 5", "step 9"]


NAMES = sorted({"base", *meanings(), *(name for file in ROOT.glob("params/*/3_*.yaml")
                for name in re.findall(r'"(\w+)": {"method"', file.read_text()))})


def test_a_method_looks_the_same_in_every_figure_and_like_no_other():
    import seaborn

    alone = {name: figures.styles([name])[name] for name in NAMES}
    together = figures.styles(NAMES)
    assert {n: s for n, s in alone.items() if s != together[n]} == {}
    assert len(set(map(str, alone.values()))) == len(NAMES)
    named = ("base", "sft", "sft_matched", "sft_matched_weaken", "sft_compute", "bpo",
             "bpo_weaken", "bpo_dpo_alone")
    assert len({figures.colour(name) for name in named}) == len(named)
    assert {*figures.COLOURS} <= {*seaborn.color_palette("colorblind").as_hex()}
    many = [f"my method {n}" for n in range(400)]  # of 672 looks
    assert len(set(map(str, figures.styles(many).values()))) == 400


def test_importing_is_cheap():
    script = ("import sys, bpo.reports.page, bpo.reports.figures, bpo.reports.cards\n"
              "heavy = {'torch', 'transformers', 'seaborn', 'nbconvert', 'pandas'}\n"
              "print(sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_marked_words():
    assert cards.mark_differences("a green <box>, big", "a red <box>, big") == (
        "a <mark>green</mark> &lt;box&gt;, big")
    assert cards.mark_differences("two old cats sit", "one cat sits sit") == (
        "<mark>two old cats</mark> sit")
    assert cards.mark_differences("same", "same") == "same"
    assert cards.mark_differences("", "gone") == ""
    text = "A Dining table, tables & dogs"
    assert cards.mark_words(text, {"dining table", "table", "&"}) == (
        'A <mark class="wrong">Dining table</mark>, tables <mark class="wrong">&amp;</mark> dogs')
    assert cards.mark_words("a Blue dog, blue cat", {("blue", "cat")}) == (
        'a Blue dog, <mark class="wrong">blue</mark> cat')
    assert cards.mark_words("<b>", set()) == "&lt;b&gt;"
    assert cards.mark_words("\x07 no", {"\x07 no"}) == '<mark class="wrong">\\x07 no</mark>'


def test_image_sizes_and_kinds():
    import base64
    import io

    def decoded(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))

    small = decoded(cards.image_uri(picture(64), 200))
    assert small.size == (192, 192) and small.format == "PNG"
    assert sorted(small.getcolors()) == sorted([(22 * 22 * 9, (255, 0, 0)),
                                                (192 * 192 - 22 * 22 * 9, (255, 255, 255))])
    assert decoded(cards.image_uri(picture(640))).size == (160, 160)
    noise = Image.effect_noise((600, 300), 80).convert("RGB")
    assert cards.image_uri(noise).startswith("data:image/jpeg")
    assert cards.image_uri(noise.crop((0, 0, 150, 150))).startswith("data:image/png")
    assert decoded(cards.image_uri(noise)).size == (160, 80)


def test_tables_sentences_and_estimates():
    text = report.table(pandas.DataFrame(
        {"score": [Estimate(0.3451, 0.3119, 0.381).text(), "–"], "x": [5e-6, float("nan")],
         "name": ["a", None]}, index=["base", "BPO"]), "t").html
    assert Estimate(0.3451, 0.3119, 0.381).text() == "0.345 [0.312, 0.381]"
    assert Estimate(0.1, -0.2, 0.4).text(sign="+") == "+0.100 [−0.200, +0.400]"
    assert text.count('class="number"') == 2 * 3
    assert "<bdi>5e-06</bdi>" in text and "<bdi>BPO</bdi>" in text
    said = report.say("**{n:,}** of {share:.0%}", n=1284, share=0.5)
    assert "<strong><bdi>1,284</bdi></strong> of <bdi>50%</bdi>" in said.html
    assert repr(said) == "1,284 of 50%"


def test_long_text_is_cut_wherever_it_stands(tmp_path):
    import matplotlib.pyplot as plt

    long = "w" * 100_000
    parts = [report.say("said {x}", x=long),
             report.table(pandas.DataFrame({"a": [long]}), long, long),
             report.figure(plt.figure(figsize=(1, 1)), long, long)]
    for part in parts:
        assert len(part.html) < 40_000 and "… 96,000 more characters" in part.html
    notebook = new_notebook(cells=[new_markdown_cell("# Long"), code("report.say(long)", display(
        text__html=parts[0].html, text__plain=parts[0].plain))])
    nbformat.write(notebook, tmp_path / "0.ipynb")
    index = report.index_page(tmp_path, [{
        "name": "0", "title": long, "status": "complete",
        "headline": report.headline(tmp_path / "0.ipynb")}])
    for page in (index, report.html_page(tmp_path / "0.ipynb")):
        assert "w" * 4_001 not in page.read_text() and " more characters" in page.read_text()


@pytest.mark.study
def test_browser_opens_pages_without_a_request_or_error(page, browser):
    index = report.index_page(page.parent, [{"name": "3_run", "title": "x", "status": "complete"}])
    for path in (page, index):
        with alone(browser, path.as_uri()) as tab:
            broken = tab.evaluate("[...document.images].filter(i => !i.naturalWidth).length")
            assert broken == (1 if path == page else 0)  # the PNG that is none
