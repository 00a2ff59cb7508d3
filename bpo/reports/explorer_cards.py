"""What the explorers show: cards of a picture with its answers, live in a widget or still on a
page. Nothing here computes an answer.
"""

import html
from collections.abc import Sequence

import torch
from PIL import Image

from bpo.evaluation import probe
from bpo.models.noise import STEPS, signal_to_noise
from bpo.reports.cards import LONGEST_ALT, Shown, image_uri
from bpo.study.text import as_text, shortened, visible

PICTURE = 256  # pixels; a picture of the tiny world grows to that
# Of the true and the prior's answer, as in the notebook's curves; readable on light and on dark.
COLOURS = {"true": "#2f7fc1", "prior": "#d98200", "other": "#8a9097"}
LABELS = {"true": "true answer", "prior": "prior's answer", "other": "any other answer"}
QUIET = "color-mix(in srgb, currentColor {}%, transparent)"


def _picture(image: Image.Image, alt: object, width: int) -> str:
    words = html.escape(visible(shortened(alt, LONGEST_ALT)))
    return (f'<img alt="{words}" src="{image_uri(image, width)}" '
            f'style="flex:none;max-width:100%;width:{width}px;image-rendering:pixelated">')


def _beside(picture: str, inner: str) -> str:
    return (f'<div class="card" style="display:flex;flex-wrap:wrap;gap:1em 1.5em;'
            f'align-items:flex-start;max-width:58rem">{picture}'
            f'<div style="flex:1 1 20rem;min-width:0">{inner}</div></div>')


def at_step(image: Image.Image, question: str, step: int, answers: Sequence[dict],
            curve: Sequence[tuple[int, Sequence[dict]]]) -> Shown:
    """The live view: the picture, the answers' probabilities, where the step is on their curve.

    answers: [{kind, text, logp}], logp in nats of the whole answer; curve: (step, answers) of the
    same image along the noise.
    """
    level = "the clean image" if step == 0 else f"signal to noise {signal_to_noise(step):+.1f} dB"
    inner = (f'<p class="question" style="margin-top:0">{as_text(question)}</p>'
             f'<p style="margin:.2em 0 .8em">Noise step {step}, {level}</p>'
             f"{_bars(answers)}{_curve(curve, step, answers)}")
    return Shown(_beside(_picture(image, f"The image at noise step {step}", PICTURE), inner), "")


def still_at_step(image: Image.Image, step: int, answers: Sequence[dict]) -> str:
    """The inside of one still card: the picture at a noise step and its answers' probabilities."""
    return (f'{_picture(image, f"The image at noise step {step}", 192)}'
            f'<p style="margin:.4em 0"><strong>step {step}</strong></p>{_bars(answers)}')


def side_by_side(cards: Sequence[str], caption: str) -> Shown:
    """Cards in a row that breaks where the page is narrow."""
    inner = "".join(f'<div class="card">{card}</div>' for card in cards)
    return Shown('<figure><div class="cards" style="grid-template-columns:repeat(auto-fill,'
                 f'minmax(min(100%,14rem),1fr))">{inner}</div>'
                 f"<figcaption>{as_text(caption)}</figcaption></figure>", f"Figure: {caption}")


def _shares(answers: Sequence[dict]) -> list[tuple[str, str, float]]:
    """(kind, text, probability) of each candidate and of all other answers together."""
    chances = [(a["kind"], a["text"], float(torch.tensor(a["logp"]).exp())) for a in answers]
    return [*chances, ("other", "", max(0.0, 1 - sum(chance for *_, chance in chances)))]


def _bars(answers: Sequence[dict]) -> str:
    rows = []
    for kind, text, chance in _shares(answers):
        number = f"{chance:.3f}" if chance >= 0.0005 or chance == 0 else f"{chance:.0e}"
        words = as_text(f"“{text}”") if text else ""
        rows.append(
            f'<div style="margin-top:.5em"><div style="display:flex;gap:1em;align-items:baseline;'
            f'justify-content:space-between"><span><span class="label" style="display:inline">'
            f'{LABELS[kind]}</span> {words}</span><span style="font-variant-numeric:tabular-nums">'
            f'{number}</span></div><div aria-hidden="true" style="height:.55em;border-radius:3px;'
            f'background:{QUIET.format(12)}"><div style="height:100%;border-radius:3px;'
            f'width:{100 * chance:.1f}%;background:{COLOURS[kind]}"></div></div></div>')
    return "".join(rows)


def _curve(curve: Sequence[tuple[int, Sequence[dict]]], step: int, answers: Sequence[dict]) -> str:
    """The image's own stored curves as a small drawing, with a mark where the step stands."""
    width, height = 360, 84

    def place(at: int, chance: float) -> str:
        return f"{at / (STEPS - 1) * width:.1f},{(1 - min(chance, 1)) * height:.1f}"

    def total(mine: Sequence[dict], kind: str) -> float:
        return sum(chance for k, _, chance in _shares(mine) if k == kind)

    parts = [f'<path d="M0,0H{width}M0,{height}H{width}" stroke="{QUIET.format(25)}"/>',
             f'<path d="M{place(step, 1)}V{height}" stroke="{QUIET.format(55)}" '
             'stroke-dasharray="3 3"/>']
    for kind in probe.KINDS:
        points = " ".join(place(at, total(mine, kind)) for at, mine in curve)
        x, y = place(step, total(answers, kind)).split(",")
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[kind]}" '
                     f'stroke-width="2"/><circle cx="{x}" cy="{y}" r="4" fill="{COLOURS[kind]}"/>')
    return (f'<svg role="img" aria-label="Probabilities of this image along the noise steps" '
            f'viewBox="-24 -8 {width + 40} {height + 26}" style="display:block;margin-top:1em;'
            f'width:100%;max-width:30rem" font-size="10" fill="currentColor">'
            f'<text x="-6" y="4" text-anchor="end">1</text>'
            f'<text x="-6" y="{height + 3}" text-anchor="end">0</text>'
            f'<text x="0" y="{height + 14}">clean</text><text x="{width}" y="{height + 14}" '
            f'text-anchor="end">step {STEPS - 1}</text>{"".join(parts)}</svg>')


def answered(image: Image.Image, question: str, told: Sequence[tuple[str, object]],
             note: str = "") -> Shown:
    """The picture, the question, and under it what each one says.

    told: (name, text), text as plain text or marked by `galleries.mark_words`.
    """
    table = "".join(
        f'<div style="display:contents"><dt>{as_text(name)}</dt>'
        f'<dd>{as_text(text) if text else "–"}</dd></div>' for name, text in told)
    inner = (f'<p class="question" style="margin-top:0">{as_text(question)}</p>'
             f'<dl>{table}</dl>')
    card = _beside(_picture(image, f"The image asked about: {question}", PICTURE), inner)
    caption = f"<figcaption>{as_text(note)}</figcaption>" if note else ""
    return Shown(f"<figure>{card}{caption}</figure>",
                 "\n".join([question, *(f"{name}: {text}" for name, text in told)]))
