"""What the page template does to text: Markdown, formulas, code, terminal escapes.

Functions import what they need: nbconvert takes seconds, and only those who render should pay.
"""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bpo.study.text import as_text, visible

ANSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")


def strip_ansi(text: str) -> str:
    """`text` without terminal colours, what else a page would swallow made visible."""
    return visible(ANSI.sub("", text))


def under_headings(rows: Sequence[str], headings: Sequence[str], columns: int) -> str:
    """The rows of a table; the heading of each, if any, is said once over those that share it."""
    out = ""
    for place, row in enumerate(rows):
        if len(headings) and (not place or headings[place] != headings[place - 1]):
            out += (f'<tr class="group"><th scope="colgroup" colspan="{columns}">'
                    f"{as_text(headings[place])}</th></tr>")
        out += row
    return out


def highlight_python(code: str) -> str:
    """Python as HTML with the token classes that page.css colours."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    coloured = highlight(visible(code), PythonLexer(), HtmlFormatter())
    return coloured.replace("<pre>", '<pre tabindex="0">', 1)  # what scrolls, keys must reach


def anchor(heading: str) -> str:
    """The id of a heading, for links to it."""
    return "-".join(re.findall(r"\w+", html.unescape(heading).lower()))


def markdown_page(folder: Path) -> Callable[[str], str]:
    """A function from Markdown to HTML: formulas as MathML, pictures from `folder` inlined.

    A picture that is elsewhere gives its description: a page loads nothing.
    """
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return formula(body, display="inline")

        def block_math(self, body: str) -> str:
            return formula(body, display="block")

        def latex_environment(self, name: str, body: str) -> str:
            return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", display="block")

        def heading(self, text: str, level: int, **_: object) -> str:
            return f'<h{level} id="{anchor(re.sub("<[^>]+>", "", text))}">{text}</h{level}>\n'

        def image(self, text: str, url: str, title: str | None = None) -> str:
            picture = super().image(text, url, title)
            return picture if 'src="data:' in picture else f"[{text}]"

        def link(self, text: str, url: str, title: str | None = None) -> str:
            # Another notebook is beside this one in JupyterLab; a page has links of its own.
            return text if url.endswith(".ipynb") else super().link(text, url, title)

        def block_html(self, html: str) -> str:
            # the search for pictures would close a fold whose content is Markdown
            return html if html.startswith(("<details", "</details")) else super().block_html(html)

        def table(self, text: str) -> str:
            # a table is as wide as its words: it scrolls in a box that keys reach
            return ('<div class="wide" tabindex="0" role="group" aria-label="table">\n'
                    f"<table>\n{text}</table>\n</div>\n")

    renderer = Renderer(escape=False, embed_images=True, exclude_anchor_links=True,
                        path=str(folder))
    return lambda source: MarkdownWithMath(renderer).render(source)


def formula(tex: str, *, display: str) -> str:
    """MathML, or the TeX itself as code where the converter fails or leaves TeX behind.

    display: "inline" or "block".
    """
    from latex2mathml.converter import convert

    text = tex.strip().replace("~", r"\ ")
    # `aligned` is unknown to the converter, letters without braces stay plain in the browser
    text = re.sub(r"(begin|end)\{aligned\}", r"\1{align*}", text)
    text = re.sub(r"\\(mathcal|mathbb|mathbf) ?([A-Za-z])", r"\\\1{\2}", text)
    # TeX sets a thin space on either side of an operator's name
    text = re.sub(r"([\w}])\s*\\(log|exp|ln)(?![A-Za-z])", r"\1\\,\\\2", text)
    text = re.sub(r"\\(log|exp|ln)(?![A-Za-z_^(]|\s*\\left)", r"\\\1\\,", text)
    try:
        # it reads \sim as a letter, which gets no space around it
        mathml = convert(text, display=display).replace("<mi>&#x0007E;</mi>", "<mo>∼</mo>")
    except Exception:  # it raises of many kinds, and a formula must not cost the page
        mathml = "\\"
    if "\\" in mathml or "<mi>&</mi>" in mathml or tex.count("{") != tex.count("}"):
        return f"<code>{html.escape(tex)}</code>"
    return mathml
