"""Turn executed notebooks into pages, and results into what a notebook shows.

A page is one HTML file that opens offline: no request, no script, formulas as MathML, code folded.
Pictures are drawn in figures.py, cards are in cards.py; nothing here computes a result.
"""

import html
import io
import math
import os
import re
import string
from collections import Counter
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bpo.params import Parameters
from bpo.reports.cards import OUTPUT_STYLE, Shown, data_uri
from bpo.reports.look import IN_THE_DARK
from bpo.reports.template import executed, filters
from bpo.study.files import write_whole
from bpo.study.text import as_text, joined, number, shortened, visible

if TYPE_CHECKING:
    import matplotlib.figure
    import nbformat
    import pandas

TEMPLATE = Path(__file__).parent / "template"
NUMBER = re.compile(r"[-+−]?\d[\d.,e+-]* ?%?( \[.*\])?( better| worse)?|–|nan.*")
ESTIMATE = re.compile(r"([-+−]?[\d.,]+%?) (\[[-+−\d., %]+\])(.*)")
# What may be wider than a page is reached and moved by the keyboard. No landmark: a page has many.
SCROLLS = 'tabindex="0" role="group" aria-label'
STAMP = "bpo_stamp"  # in the metadata of an executed notebook
SIGNS = {"complete": "✓", "failed": "✗"}
# Characters: a wider table has its intervals below its numbers; is a card a row on a phone.
DESK, PHONE = 106, 44
LINKS = {"html": "report", "ipynb": "notebook", "manifest": "manifest"}


def figure(fig: "matplotlib.figure.Figure", alt: str, caption: str) -> Shown:
    """The figure as SVG, light or dark with the page; `alt` says what it shows, `caption` names n
    and interval.

    The same figure gives the same bytes. `fig` is closed, so that it is not drawn a second time.
    """
    # matplotlib takes a while to import
    import matplotlib.pyplot as plt

    svg = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "bpo"}):
        fig.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (round(110 * inches) for inches in fig.get_size_inches())
    plt.close(fig)
    drawn = svg.getvalue().replace(b"</svg>", f"{IN_THE_DARK}</svg>".encode())
    return Shown(
        f'<figure><div class="plot"><img alt="{_line(alt)}" width="{width}" '
        f'height="{height}" src="{data_uri(drawn, "image/svg+xml")}"></div>'
        f"<figcaption>{_line(caption)}</figcaption></figure>",
        plain=f"Figure: {caption}",
    )


def table(frame: "pandas.DataFrame", caption: str, note: str = "", *, groups: Sequence[str] = ()
          ) -> Shown:
    """The frame as a table; columns of numbers and of `estimate`s are set right.

    An index that is not just 0, 1, 2 ... becomes the first column. `note` goes under the table.
    groups: the heading of each row, said once over rows that have the same.
    """
    if list(frame.index) != list(range(len(frame))):
        frame = frame.reset_index()
    cells = {name: [_cell(value) for value in frame[name]] for name in frame.columns}
    kinds = {name: ' class="number"' if all(map(NUMBER.fullmatch, column)) else ""
             for name, column in cells.items()}
    head = "".join(f'<th scope="col"{kinds[name]}>{as_text(name)}</th>' for name in cells)
    rows = filters.under_headings([
        "<tr>" + "".join(f'<td{kinds[name]} data-label="{_line(str(name))}">'
                         f"{_shown_cell(cells[name][row])}</td>" for name in cells)
        + "</tr>" for row in range(len(frame))], groups, len(cells))
    title = _line(caption)
    # numbers do not wrap, words do
    wide = sum(3 + max(*map(len, str(n).split()), *(
        len(x) if kinds[n] else min(len(x), 26) for x in ["", *column]))
        for n, column in cells.items())
    below = f'<p class="note">{_line(note)}</p>' if note else ""
    return Shown(
        f'<div class="scroll" {SCROLLS}="{title}">'
        f'<table class="{"tall" if wide > DESK else "flat"}{" cells" * (wide > PHONE)}">'
        f"<caption><span>{title}</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{below}",
        plain=f"Table: {caption}\n{frame.to_string(index=False)}",
    )


def _line(text: str) -> str:
    return html.escape(visible(shortened(joined(text))))


def _shown_cell(text: str) -> str:
    """The cell as HTML; the interval of an estimate is an element, so that it can go below."""
    match = ESTIMATE.fullmatch(text)
    if not match:
        return as_text(text)
    value, interval, rest = map(as_text, match.groups())
    return f'{value} <span class="interval">{interval}</span>{rest if match[3] else ""}'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Integral) or not isinstance(value, Real):  # numpy's numbers count too
        return str(value)
    if math.isnan(value):
        return "–"
    return f"{value:.3g}" if 0 < abs(value) < 0.001 else number(value)


class _Text(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        text = super().format_field(value, format_spec)
        return text.replace("-", "−") if isinstance(value, Real) else text


class _Escaping(_Text):
    def format_field(self, value: Any, format_spec: str) -> str:
        return as_text(super().format_field(value, format_spec))


def say(template: str, **values: object) -> Shown:
    """A sentence: the template is ours and may hold **bold**, the values are only ever text."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(template, quote=False))
    return Shown(f"<p>{_Escaping().format(bold, **values)}</p>", kind="say",
                 plain=_Text().format(template.replace("**", ""), **values))


def facts(mapping: dict[str, object]) -> Shown:
    """A compact box of names and values: study, seed, versions, inputs."""
    rows = "".join(f"<dt>{as_text(k)}</dt><dd>{as_text(v)}</dd>" for k, v in mapping.items())
    return Shown(f'<dl class="facts">{rows}</dl>',
                 plain="\n".join(f"{name}: {value}" for name, value in mapping.items()))


def folded(title: str, *shown: Shown) -> Shown:
    """What is rarely asked, behind a line that opens it."""
    inner = "".join(part.html for part in shown)
    return Shown(f"<details><summary>{_line(title)}</summary>{inner}</details>", kind="fold",
                 plain="\n".join([f"{title}:", *(part.plain for part in shown)]))


def clean_notebook(path: Path, made_by: Parameters | None = None) -> None:
    """Take progress bars out of an executed notebook, in place: text bars, widgets, their state;
    and the folders that papermill noted, since a study may move.

    made_by: the parameters of an execution that succeeded; the notebook then gets its stamp.
    """
    import nbformat

    notebook = _read(path)
    executed.drop_progress(notebook)
    for name in {"input_path", "output_path"} & notebook.metadata.get("papermill", {}).keys():
        notebook.metadata.papermill[name] = Path(notebook.metadata.papermill[name]).name
    if made_by is not None:
        notebook.metadata[STAMP] = executed.stamp(notebook, made_by)
    write_whole(path, nbformat.writes(notebook) + "\n")


def bears_stamp(path: Path, p: Parameters) -> bool:
    """Whether an executed notebook was made from what it would be made from now, and nobody has
    changed its cells since. False for one that computes no stage."""
    notebook = _read(path)
    stamp = notebook.metadata.get(STAMP)
    return bool(stamp) and stamp == executed.stamp(notebook, p)


def plain(text: str) -> str:
    """`text` without terminal colours."""
    return filters.strip_ansi(text)


def failure_message(notebook: Path) -> str | None:
    """What stopped an executed notebook; None where all of its cells ran."""
    failure = executed.failure(_read(notebook))
    return failure["message"] if failure else None


def headline(notebook: Path) -> str:
    """The last sentence that an executed notebook said with `say`; "" if it said none."""
    return executed.last_sentence(_read(notebook))


def _read(notebook: Path) -> "nbformat.NotebookNode":
    import nbformat

    return nbformat.read(notebook, as_version=4)


def html_page(notebook: Path) -> Path:
    """Render an executed notebook to one offline HTML file beside it.

    A cell's error is also named at the top, so that a failed run is a report.
    """
    # nbconvert takes seconds to import; only those who render pay for it
    from nbconvert.exporters import TemplateExporter

    content = _read(notebook)
    executed.drop_progress(content)
    # papermill announces an error in cells of its own; the page has its own way
    content.cells = [cell for cell in content.cells
                     if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
    failure = executed.failure(content)
    exporter = TemplateExporter(
        template_name="template", template_file="page.html.j2", template_extension=".html.j2",
        extra_template_basedirs=[str(TEMPLATE.parent)],
        exclude_input_prompt=True, exclude_output_prompt=True,
    )
    exporter.register_filter("markdown_page", filters.markdown_page(notebook.parent))
    exporter.register_filter("highlight_python", filters.highlight_python)
    exporter.register_filter("strip_ansi", filters.strip_ansi)
    page, _ = exporter.from_notebook_node(content, resources={
        "title": executed.title(content) or notebook.stem,
        "study": notebook.resolve().parent.name,
        "styles": _styles(),
        "failure": failure,
        # A reader in a hurry meets the question, what came out and the facts before the rest.
        "opening": content.cells[0].get("id") if content.cells else None,
        "short": "" if failure else shortened(executed.last_sentence(content)),
        "facts": _take_facts(content),
        "contents": executed.contents(content),
        "terms": executed.terms_of(content),
        "notebook": notebook.name,
        "executed": executed.when(content),
    })
    write_whole(notebook.with_suffix(".html"), page.replace(OUTPUT_STYLE, ""))
    _link_pages(notebook.parent)
    return notebook.with_suffix(".html")


def _link_pages(folder: Path) -> None:
    """Each page of a study links to the one before and the one after it that are there."""
    pages = sorted(folder.glob("[0-9]_*.html"))
    texts = [file.read_text(encoding="utf-8") for file in pages]
    named = (re.search("<title>(.*?)</title>", text, re.S) for text in texts)
    titles = [found[1] if found else file.stem for file, found in zip(pages, named, strict=True)]
    for place, (file, text) in enumerate(zip(pages, texts, strict=True)):
        links = [f'<a href="{quote(pages[at].name)}">{before}{titles[at]}{after}</a>'
                 for at, before, after in ((place - 1, "← ", ""), (place + 1, "", " →"))
                 if 0 <= at < len(pages)]
        linked = re.sub("(?<=<!-- neighbours -->).*?(?=<!-- /neighbours -->)",
                        lambda _: " ".join(links), text, flags=re.S)  # noqa: B023
        if linked != text:
            write_whole(file, linked)


def _take_facts(notebook: "nbformat.NotebookNode") -> str:
    """The first box of facts, out of the cell that shows it, as HTML; "" if none does."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shown = output.get("data", {}).get("text/html", "")
            if '<dl class="facts">' in shown:
                cell.outputs.remove(output)
                return shown
    return ""


def index_page(folder: Path, entries: list[dict[str, Any]], **shown: Any) -> Path:
    """Write a study's `index.html`: what `index.screen` says, then status, headline, time and links
    of each of its notebooks, then its facts.

    entries: {"name", "title", "status": "complete" or "failed", "headline", "seconds", "html",
    "ipynb", "manifest", "message"}; what is None or missing is left out. Files are given as
    absolute paths or relative to the study's folder.
    """
    return _page("study.html.j2", folder, entries, study=visible(folder.resolve().name), **shown)


def studies_page(root: Path, entries: list[dict[str, Any]]) -> Path:
    """Write the list of all studies, as `index_page` lists notebooks, into their folder."""
    return _page("studies.html.j2", root, entries)


def _page(template: str, folder: Path, entries: list[dict[str, Any]], **values: Any) -> Path:
    from jinja2 import Environment, FileSystemLoader

    counts = Counter(entry["status"] for entry in entries)
    environment = Environment(loader=FileSystemLoader(TEMPLATE), autoescape=True)
    write_whole(folder / "index.html", environment.get_template(template).render(
        **values, rows=[_index_row(folder, entry) for entry in entries],
        styles=_styles("index.css"),
        summary=", ".join(f"{counts[status]} {status}" for status in SIGNS if counts[status])))
    return folder / "index.html"


def _index_row(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    links = {label: quote(os.path.relpath(folder / entry[kind], folder))
             for kind, label in LINKS.items() if entry.get(kind)}
    texts = {key: visible(shortened(entry.get(key) or "")) for key in ("name", "title", "headline")}
    status, seconds = entry["status"], entry.get("seconds")
    return texts | {
        "message": filters.strip_ansi(entry.get("message") or ""),
        "status": status, "sign": SIGNS[status], "links": links,
        "seconds": executed.duration(seconds) if seconds is not None else ""}


def _styles(*more: str) -> str:
    return "".join((TEMPLATE / name).read_text(encoding="utf-8")
                   for name in ("page.css", "outputs.css", *more))
