"""Escaped text, pictures and cards: what models and data say, shown as text and nothing else.

Text may hold HTML, Markdown, TeX, control and right-to-left characters, and be longer than anyone
reads. Everything that becomes HTML passes through `as_text`, `mark_words` or `mark_differences`,
which show the first `LONGEST` characters and how many more there are.
"""

import base64
import difflib
import html
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from bpo.study.text import LONGEST_ALT, as_text, cut, shortened, visible

OUTPUT_STYLE = (Path(__file__).parent / "template" / "outputs.css").read_text(encoding="utf-8")
OUTPUT_STYLE = f"<style>\n{OUTPUT_STYLE}</style>\n"


class Shown:
    """HTML for JupyterLab and the page, a line of plain text for everything else.

    JupyterLab would typeset `$...$` inside HTML: the class on the outer element forbids it.
    """

    def __init__(self, inner: str, plain: str, kind: str = ""):
        self.html = f'<div class="bpo mathjax_ignore {kind}">{inner}</div>'
        self.plain = plain

    def _repr_html_(self) -> str:
        return OUTPUT_STYLE + self.html

    def __repr__(self) -> str:
        return self.plain


def mark_differences(text: str, reference: str) -> Markup:
    """Escaped `text` with each run of words that `reference` has not at that place in <mark>."""
    # Both are cut at one length, so that what differs beyond it marks nothing; matching is slow.
    (text, rest), (reference, _) = cut(text), cut(reference)
    # words and signs, each with the space behind it
    text, reference = visible(text), visible(reference)
    expected, pieces = (re.findall(r"(?:\w+|[^\w\s])\s*", t) for t in (reference, text))
    matcher = difflib.SequenceMatcher(None, [piece.strip() for piece in expected],
                                      [piece.strip() for piece in pieces], autojunk=False)
    same = {place for _, start, size in matcher.get_matching_blocks()
            for place in range(start, start + size)}
    runs = [text[:len(text) - len(text.lstrip())]]
    for agrees, places in itertools.groupby(range(len(pieces)), key=same.__contains__):
        run = "".join(pieces[place] for place in places)
        words = run.rstrip()
        marked = html.escape(words) if agrees else f"<mark>{html.escape(words)}</mark>"
        runs.append(marked + run[len(words):])
    return Markup("".join(runs) + rest)


def mark_words(text: str, wrong: set[str]) -> Markup:
    """Escaped `text` with every word or phrase of `wrong`, in any case, in <mark class="wrong">."""
    text, rest = cut(text)
    phrases = sorted((re.escape(visible(w)) for w in wrong if w.strip()), key=len, reverse=True)
    # re.split with one group: odd places hold what matched, nothing where there are no phrases
    pieces = re.split(rf"(?<!\w)({'|'.join(phrases) or '(?!)'})(?!\w)", visible(text),
                      flags=re.IGNORECASE)
    escaped = [html.escape(piece) for piece in pieces]
    escaped[1::2] = [f'<mark class="wrong">{piece}</mark>' for piece in escaped[1::2]]
    return Markup("".join(escaped) + rest)


def data_uri(content: bytes, media_type: str) -> str:
    """The bytes as a data: address."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_uri(image: Image.Image | Path, width: int = 160) -> str:
    """The picture, about `width` pixels wide or twice that high, as a data: address.

    A small picture grows by a whole factor with hard edges and is a PNG; a large one shrinks and is
    a PNG or a JPEG, whichever is smaller.
    """
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            return image_uri(opened, width)
    picture = Image.new("RGB", image.size, "white")
    picture.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
    factor = min(width / picture.width, 2 * width / picture.height)
    grows = factor >= 1
    sides = [max(1, round(side * (int(factor) if grows else factor))) for side in picture.size]
    picture = picture.resize(sides, Image.NEAREST if grows else Image.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    picture.save(jpeg, "JPEG", quality=88)
    if grows or len(png.getvalue()) <= len(jpeg.getvalue()):
        return data_uri(png.getvalue(), "image/png")
    return data_uri(jpeg.getvalue(), "image/jpeg")


def _picture(image: Image.Image | Path, alt: object) -> str:
    words = html.escape(visible(shortened(alt, LONGEST_ALT)))
    return f'<img alt="{words}" src="{image_uri(image, 192)}">'


def _labelled(label: object, text: object) -> str:
    return f'<p><span class="label">{as_text(label)}</span>{as_text(text)}</p>'


def _cards(cards: Sequence[str], plain: str, kind: str = "") -> Shown:
    inner = "".join(f'<div class="card">{card}</div>' for card in cards)
    return Shown(f'<div class="cards {kind}">{inner}</div>', plain=f"{len(cards)} {plain}")


def pair_gallery(examples: list[dict[str, Any]]) -> Shown:
    """A card a preference pair: pictures, question, chosen, every rejected answer.

    examples: {"image": path or picture, "weakened": picture or None, "question", "category",
    "chosen", "rejected": [{"source", "text", perhaps "mode"}]}; words that the chosen answer has
    not are marked.
    """
    cards = []
    for example in examples:
        question, chosen = example["question"], example["chosen"]
        card = (f'<div class="head"><span class="label">{as_text(example["category"])}</span></div>'
                '<div class="images">')
        for name, picture in (("clean", example["image"]), ("weakened", example.get("weakened"))):
            if picture is not None:
                card += (f"<figure>{_picture(picture, f'{name} image for: {question}')}"
                         f"<figcaption>{name}</figcaption></figure>")
        card += f'</div><p class="question">{as_text(question)}</p>{_labelled("chosen", chosen)}'
        for answer in example["rejected"]:
            # where it came from: its source, and its mode where that says more
            origin = dict.fromkeys((answer["source"], answer.get("mode", answer["source"])))
            label = ", ".join(["rejected", *origin]).replace("_", " ")
            card += _labelled(label, mark_differences(answer["text"], chosen))
        cards.append(card)
    return _cards(cards, "preference pairs")


def comparison_gallery(examples: list[dict[str, Any]]) -> Shown:
    """A card a question: picture, truth, every method's answer, the verdict as a word.

    examples: {"image", "question", "truth", "answers": {method: (text, set of wrong words)},
    "verdict": "win", "loss", "tie" or where the answers come from}.
    """
    cards = []
    for example in examples:
        verdict = html.escape(example["verdict"])
        answers = "".join(
            _labelled(method, mark_words(text, wrong))
            for method, (text, wrong) in example["answers"].items())
        cards.append(
            f'<div class="head"><span class="question">{as_text(example["question"])}</span>'
            f'<span><span class="verdict {verdict}">{verdict}</span></span></div>'
            f"{_picture(example['image'], example['question'])}"
            f"{_labelled('truth', example['truth'])}{answers}")
    return _cards(cards, "compared answers")


def sample_gallery(examples: list[dict[str, Any]]) -> Shown:
    """A small card a picture; examples: {"image", "lines": texts under it}."""
    cards = [_picture(example["image"], " ".join(map(str, example["lines"])))
             + "".join(f"<p>{as_text(line)}</p>" for line in example["lines"])
             for example in examples]
    return _cards(cards, "samples", kind="small")
