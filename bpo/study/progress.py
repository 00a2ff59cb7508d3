"""How far the work is and how long it will take: of the part at hand, and of the whole stage whose
parts are announced. Nothing of it stays.

In JupyterLab a bar stands in an output that is updated in place, in a terminal a line is written
over; elsewhere, as in a log, a line is written each minute.
"""

import html
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bpo.study import processes
from bpo.study.text import duration

# Set by `bpo run` for its kernels: "terminal" where somebody sees what they write to stderr.
RUN = "BPO_RUN"
EVERY = {"kernel": 0.3, "terminal": 0.1, "log": 60.0}  # seconds between two pictures


@dataclass(eq=False)
class Part:
    """Work that is under way. total, done, spared: in units of its own, or in weights of its parts;
    spared is what was done before and took no time. weight: its own, in the part around it. spent:
    seconds that its units took; first: those of the first, which may warm up."""

    label: str
    total: float = 0.0
    done: float = 0.0
    spared: float = 0.0
    weight: float = 0.0
    unit: str = ""
    announced: list[tuple[str, float]] = field(default_factory=list)
    moved: bool = False
    spent: float = 0.0
    first: float = 0.0
    began: float = field(default_factory=lambda: time.monotonic())

    def take(self, label: str) -> float:
        """The weight of a part that begins, 0 where it was not announced."""
        at = next((n for n, (name, _) in enumerate(self.announced) if name == label), None)
        return 0.0 if at is None else self.announced.pop(at)[1]

    def left(self, done: float, spared: float) -> str:
        """", 3 min left": the time for the rest, at the speed so far; shares of 1."""
        if done <= spared:
            return ""
        seconds = (time.monotonic() - self.began) * (1 - done) / (done - spared)
        return f", {duration(seconds)} left"


_parts: list[Part] = []  # from the whole to what is at hand
ended: list[Part] = []  # those of this process whose units were counted, in their order
_shown: dict[str, Any] = {"at": 0.0, "width": 0, "sentence": "", "display": None}


def announce(parts: Iterable[tuple[str, float]]) -> None:
    """The parts that the work under way will have, and how long each takes, in any unit."""
    if _parts:
        _parts[-1].announced = list(parts)
        _parts[-1].total = sum(weight for _, weight in _parts[-1].announced)


@contextmanager
def part(label: str, total: float = 0.0, *, done: float = 0.0, unit: str = ""
         ) -> Iterator[Callable[[float], None]]:
    """A part of what is under way; gives a function that takes how many of its units were done just
    now, 0 where the time until now was no unit's. total: its units, 0 where they are not known;
    done: those from before."""
    around = _parts[-1] if _parts else Part("")
    mine = Part(label, total, done, done, around.take(label), unit)
    if not _parts:
        _shown["at"] = time.monotonic()
    _parts.append(mine)
    since = mine.began

    def advance(units: float = 1) -> None:
        nonlocal since
        before, since = since, time.monotonic()
        mine.spent += since - before if units else 0.0
        mine.first = mine.first or mine.spent
        mine.done = min(mine.done + units, mine.total) if mine.total else mine.done + units
        for other in _parts:
            other.moved = True
        _show()

    try:
        yield advance
    finally:
        if mine in _parts:  # else what is around it has failed and ended before
            del _parts[_parts.index(mine):]
        if mine.done > mine.spared and mine.unit:
            ended.append(mine)
        share = mine.spared / mine.total if mine.total else float(not mine.moved)
        around.done += mine.weight
        around.spared += mine.weight * min(share, 1.0)
        if not _parts:
            _clear()


@contextmanager
def stage(label: str, sentence: str) -> Iterator[None]:
    """A stage as a part. The sentence says what is done: it is shown above the bar, and stays."""
    if not _parts and _in_kernel():
        from IPython.display import display

        _shown["sentence"] = sentence
        _shown["display"] = display({"text/plain": sentence}, raw=True, display_id=True)
    elif processes.rank() == 0:
        print(sentence, flush=True)
    with part(label):
        yield


def shares() -> tuple[float, float]:
    """Of the whole that is under way, the share that is done, and the one that was spared."""
    done = spared = weight = 0.0
    for p in reversed(_parts):
        if p.total:
            done = min((p.done + weight * done) / p.total, 1.0)
            spared = min((p.spared + weight * spared) / p.total, 1.0)
        weight = p.weight
    return done, spared


def line() -> str:
    """"text model 120 of 900 steps, 20 s left; all in all 43 %, 3 min left"."""
    at, whole = _parts[-1], _parts[0]
    text = f"{at.label} {at.done:,.0f}" + (f" of {at.total:,.0f}" if at.total else "")
    text += f" {at.unit}".rstrip()
    if at.total:
        text += at.left(at.done / at.total, at.spared / at.total)
    if whole is not at and whole.total:
        done, spared = shares()
        text += f"; all in all {done:.0%}{whole.left(done, spared)}"
    return text


def _in_kernel() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def _place() -> str:
    if _in_kernel():
        return "terminal" if os.environ.get(RUN) == "terminal" else "kernel"
    return "terminal" if sys.stderr.isatty() else "log"


def _show() -> None:
    place = _place()
    if processes.rank() > 0 or time.monotonic() - _shown["at"] < EVERY[place]:
        return
    _shown["at"] = time.monotonic()
    if place == "log":
        print(line(), file=sys.stderr, flush=True)
    elif place == "terminal":
        text = line()[:shutil.get_terminal_size().columns - 1]
        print("\r" + text.ljust(_shown["width"]), end="", file=sys.stderr, flush=True)
        _shown["width"] = len(text)
    elif _shown["display"] is not None:
        share = f' value="{shares()[0]:.3f}"' if _parts[0].total or _parts[-1].total else ""
        _shown["display"].update({
            "text/plain": f'{_shown["sentence"]}\n{line()}',
            "text/html": f'<pre>{html.escape(_shown["sentence"])}</pre><progress{share}></progress>'
                         f" {html.escape(line())}"}, raw=True)


def _clear() -> None:
    if _shown["width"]:
        print("\r" + " " * _shown["width"], end="\r", file=sys.stderr, flush=True)
    if _shown["display"] is not None:
        _shown["display"].update({"text/plain": _shown["sentence"]}, raw=True)
    _shown.update(width=0, display=None)
