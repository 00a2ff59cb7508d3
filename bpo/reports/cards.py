"""Escaped text, pictures and cards: what models and data say, shown as text and nothing else.

Text may hold HTML, Markdown, TeX, control and right-to-left characters, and be longer than anyone
reads. Everything that becomes HTML passes through `as_text`, `mark_words` or `mark_differences`,
which show the first `LONGEST` characters and how many more there are.
"""

import base64
import difflib
import hashlib
import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from bpo.study.text import LONGEST_ALT, as_text, cut, joined, shortened, visible

OUTPUT_STYLE = (Path(__file__).parent / "template" / "outputs.css").read_text(encoding="utf-8")
OUTPUT_STYLE = f"<style>\n{OUTPUT_STYLE}</style>\n"


Wrong = set[str | tuple[str, str]]  # see `mark_words`


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
    (text, rest), (reference, _) = cut(joined(text)), cut(joined(reference))
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


def mark_words(text: str, wrong: Wrong) -> Markup:
    """Escaped `text` with every word or phrase of `wrong`, in any case, in <mark class="wrong">;
    of a pair the first word, where the second follows it."""
    text, rest = cut(joined(text))
    pairs = ((w, "") if isinstance(w, str) else w for w in wrong)
    phrases = sorted((re.escape(visible(word)) + r"(?!\w)"
                      + (rf"(?=\W+{re.escape(visible(behind))}(?!\w))" if behind else "")
                      for word, behind in pairs if word.strip()), key=len, reverse=True)
    # re.split with one group: odd places hold what matched, nothing where there are no phrases
    pieces = re.split(rf"(?<!\w)({'|'.join(phrases) or '(?!)'})", visible(text),
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


def _labelled(label: object, text: object, kind: str = "") -> str:
    key = f' class="key {kind}"' if kind else ""
    return f'<p><span class="label">{as_text(label)}</span><span{key}>{as_text(text)}</span></p>'


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


SAYS = {"true": "saw", "prior": "thought that it saw", "other": "something else"}


def comparison_gallery(examples: list[dict[str, Any]]) -> Shown:
    """A card a question: picture, truth, every method's answer, and where it comes from.

    examples: {"image", "question", "origin": why this one is shown, "truth", "usual": the prior's
    answer where that is another, "answers": method -> {"text", "wrong": words of it to mark,
    perhaps "kind" of `SAYS`, perhaps "chances" of the true and the prior's answer}}.
    """
    cards = []
    for example in examples:
        usual = example.get("usual", "")
        answers = ""
        for method, answer in example["answers"].items():
            text = as_text(mark_words(answer["text"], answer["wrong"]))
            if kind := answer.get("kind"):
                text += Markup(f' <span class="says {kind}">{SAYS[kind]}</span>')
            answers += f'<p><span class="label">{as_text(method)}</span><span>{text}</span></p>'
            if "chances" in answer:
                answers += _chances([example["truth"], usual], answer["chances"])
        keys = _labelled("what is there" if usual else "truth", example["truth"],
                         "true" if usual else "")
        keys += _labelled("what is usual", usual, "prior") if usual else ""
        cards.append(
            f'<div class="head"><span class="question">{as_text(example["question"])}</span>'
            f'<span><span class="origin">{html.escape(example["origin"])}</span></span></div>'
            f'<div class="asked">{_picture(example["image"], example["question"])}'
            f"<div>{keys}</div></div>{answers}")
    return _cards(cards, "compared answers")


def slider(stills: Sequence[Mapping[str, Any]], words: Sequence[str], label: str, *, known: bool
           ) -> Shown:
    """One picture at several steps, one at a time, as radio buttons choose: no script.

    stills: {"step", "image", "chances": who answers -> probabilities of the true and of the prior's
    answer}; words: these two; label: what the steps are of; known: as of `by_kind`.
    """
    group = hashlib.sha1(repr([label, [s["chances"] for s in stills]]).encode()).hexdigest()[:8]
    inner = ""
    for place, still in enumerate(stills):
        answers = ""
        for who, chances in still["chances"].items():
            kind = leading(by_kind(chances, known=known))
            answers += (f'<p><span class="label">{as_text(who)}</span> <span class="says {kind}">'
                        f"{SAYS[kind]}</span></p>{_chances(words, chances)}")
        step, at = still["step"], f"{group}-{place}"
        inner += (f'<input type="radio" name="{group}" id="{at}"{" checked" * (place == 0)}>'
                  f'<label for="{at}">{as_text(step)}</label><div class="still">'
                  f"<div>{_picture(still['image'], f'{label} {step}')}</div>"
                  f"<div>{answers}</div></div>")
    return Shown(f'<p class="label">{as_text(label)}</p><div class="slider" role="radiogroup" '
                 f'aria-label="{html.escape(label)}">{inner}</div>',
                 plain=f"{label}: {', '.join(str(s['step']) for s in stills)}")


def by_kind(chances: Sequence[float], *, known: bool) -> dict[str, float]:
    """Probabilities of the true and of the prior's answer, with their names, and, where the prior's
    answer is known, what is left to all others."""
    kinds = dict(zip(("true", "prior"), chances, strict=True))
    return kinds | ({"other": 1 - sum(chances)} if known else {})


def leading(kinds: Mapping[str, float]) -> str:
    """Which is likeliest of those that `by_kind` names."""
    return max(kinds, key=kinds.__getitem__)


def bar(shares: Mapping[str, float]) -> str:
    """A track with the shares of 1 as parts of it; their names, of `SAYS`, give the colours."""
    return '<span class="bar">' + "".join(
        f'<span class="{kind}" style="width:{share:.2%}"></span>' for kind, share in shares.items()
    ) + "</span>"


def _chances(words: Sequence[str], chances: Sequence[float]) -> str:
    return '<div class="chances">' + "".join(
        f"<span>P({as_text(word)})</span>{bar({kind: chance})}<span>{chance:.2f}</span>"
        for word, kind, chance in zip(words, ("true", "prior"), chances, strict=True)) + "</div>"


def stacked_bars(rows: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> Shown:
    """A track a row with its shares as parts, in per cent. rows: label -> kind -> share of 1;
    names: kind -> what it stands for."""
    key = "".join(f'<span class="key {kind}">{as_text(name)}</span>'
                  for kind, name in names.items())
    inner, plain = f'<p class="keys">{key}</p><div class="stacked">', []
    for label, shares in rows.items():
        texts = {kind: f"{100 * share:.1f}".removesuffix(".0") + "%"
                 for kind, share in shares.items()}
        parts = "".join(f'<span class="key {kind}">{text}</span>' for kind, text in texts.items())
        inner += f'<p>{as_text(label)}</p>{bar(shares)}<p class="parts">{parts}</p>'
        plain.append(f"{label}: " + ", ".join(f"{names[k]} {t}" for k, t in texts.items()))
    return Shown(inner + "</div>", plain="\n".join(plain))


def strips(sources: list[dict[str, Any]], key: str) -> Shown:
    """A strip a source of examples, headed by a share of them in one bar.

    sources: {"title", "note", "share": of 1, "of": what has it, "examples": [{"image": picture or
    None, "parts": [(text, whether it counts)]}]}; key: what the underlined parts are.
    """
    out = f'<p class="keys"><span class="usual">underlined</span>: {as_text(key)}</p>'
    for source in sources:
        examples = ""
        for example in source["examples"]:
            text = " ".join(f'<span class="usual">{as_text(t)}</span>' if counts
                            else f"<span>{as_text(t)}</span>" for t, counts in example["parts"])
            alt = " ".join(part for part, _ in example["parts"])
            picture = _picture(example["image"], alt) if example["image"] is not None else ""
            examples += f"<div>{picture}<p>{text}</p></div>"
        out += (f'<div class="strip"><div><p class="title">{as_text(source["title"])}</p>'
                f'<p class="share">{source["share"]:.0%}</p>{bar({"prior": source["share"]})}'
                f'<p>{as_text(source["of"])}</p><p class="note">{as_text(source["note"])}</p></div>'
                f'<div class="examples">{examples}</div></div>')
    return Shown(out, plain="\n".join(
        f"{s['title']}: {s['share']:.0%} {s['of']}" for s in sources))


def sample_gallery(examples: list[dict[str, Any]]) -> Shown:
    """A small card a picture; examples: {"image", "lines": texts under it}."""
    cards = [_picture(example["image"], " ".join(map(str, example["lines"])))
             + "".join(f"<p>{as_text(line)}</p>" for line in example["lines"])
             for example in examples]
    return _cards(cards, "samples", kind="small")
