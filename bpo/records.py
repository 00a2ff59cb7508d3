"""Rows that users hold: annotated answers to questions about images, their truth; JSON lines.

A row is one assistant turn of a conversation about one image. Readers skip what cannot be used and
count it by reason; they never stop a run over one bad row.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from bpo.params import Refusal
from bpo.seeds import seed_for


@dataclass(frozen=True)
class Row:
    """One annotated answer.

    prompt: messages {"role", "content": text} that end with the user's question.
    image: the image's file.  image_name: its path as the data set wrote it.
    category: what the truth file says, else "presence" for yes/no answers, "caption" for answers of
    20 words or more, "question" for the rest.
    """

    id: str
    image: Path
    image_name: str
    prompt: tuple[dict[str, str], ...]
    answer: str
    category: str

    @property
    def question(self) -> str:
        return self.prompt[-1]["content"]


def read_rows(data: Path, image_folder: Path | None = None) -> tuple[list[Row], Counter]:
    """The rows of a file in the LLaVA instruction layout, and why others were skipped.

    The layout is a JSON list of {id, image, conversations: [{from: human | gpt, value}]}. Every
    assistant turn becomes a row whose prompt is the turns before it.
    Raises Refusal when the file is missing, is not that layout, or holds no usable row.
    """
    if not data.is_file():
        raise Refusal(f"{data}: there is no such data file")
    try:
        entries = json.loads(data.read_text(encoding="utf-8"))
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise Refusal(f"{data}: must be a JSON list of rows in the LLaVA layout "
                      "(id, image, conversations)")
    root = (image_folder or data.parent).resolve()
    truth = read_truth(data)["rows"]
    skipped: Counter = Counter()
    rows: list[Row] = []
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        reason = _unusable(entry, root)
        if reason:
            skipped[reason] += 1
            continue
        for row in _assistant_turns(entry, number, root, truth):
            if not row.answer:
                skipped["empty answer"] += 1
            elif row.id in seen:
                skipped["duplicate id"] += 1
            else:
                seen.add(row.id)
                rows.append(row)
    if not rows:
        raise Refusal(f"{data}: none of its {len(entries)} rows can be used: "
                      + ", ".join(f"{n} {r}" for r, n in skipped.most_common()))
    return rows, skipped


def _unusable(entry: dict[str, Any], root: Path) -> str | None:
    if not entry.get("image"):
        return "no image"
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not all(
            isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        return "no conversation"
    if not any(t.get("from") == "gpt" for t in turns[1:]):
        return "no conversation"
    file = (root / str(entry["image"])).resolve()
    if not file.is_relative_to(root):
        return "image path leaves the image folder"
    if not file.is_file():
        return "image file is missing"
    try:
        with Image.open(file) as image:
            image.load()  # decodes all of it: verify() does not see that a JPEG was cut
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return "image cannot be read"
    return None


def _assistant_turns(entry: dict, number: int, root: Path, truth: dict) -> Iterator[Row]:
    turns, history = entry["conversations"], []
    answers = sum(t.get("from") == "gpt" for t in turns)
    for turn in turns:
        text = turn["value"].replace("<image>", "").strip()
        if turn.get("from") == "gpt" and history:
            base = str(entry.get("id", number))
            row_id = base if answers == 1 else f"{base}#{len(history) // 2}"
            category = truth.get(row_id, {}).get("category") or guess_category(text)
            yield Row(row_id, root / str(entry["image"]), str(entry["image"]), tuple(history),
                      text, category)
        role = "assistant" if turn.get("from") == "gpt" else "user"
        history = [*history, {"role": role, "content": text}]


def guess_category(answer: str) -> str:
    """The category of a row that no truth file describes, from its annotated answer."""
    words = answer.lower().split()
    if words and words[0].strip(".,!") in ("yes", "no"):
        return "presence"
    return "caption" if len(words) >= 20 else "question"


def read_truth(data: Path) -> dict[str, Any]:
    """truth.json beside a data file: {vocabulary, images, rows}; empty where there is none."""
    file = data.parent / "truth.json"
    truth = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {part: truth.get(part, {}) for part in ("vocabulary", "images", "rows")}


def draw_rows(rows: Sequence[Row], count: int, seed: int, *, purpose: str) -> list[Row]:
    """`count` of the rows in their own order, chosen by a hash of seed and id; 0 means all.

    The choice does not depend on which other rows are there or in which order.
    """
    if not count or count >= len(rows):
        return list(rows)
    chosen = sorted(rows, key=lambda r: seed_for(seed, purpose, r.id))[:count]
    keep = {r.id for r in chosen}
    return [r for r in rows if r.id in keep]


def load_image(file: Path) -> Image.Image:
    """The image as RGB, turned upright by its EXIF tag; palettes and transparency are resolved."""
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255
            upright = upright.convert("I").point(lambda v: v * (1 / 257)).convert("L")
        return upright.convert("RGB")


def write_whole(file: Path, text: str) -> None:
    """Writes to a temporary name and renames: a reader sees the old file or the whole new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_lines(file: Path, records: Iterable[dict]) -> None:
    write_whole(file, "".join(f"{to_json(r)}\n" for r in records))


def read_lines(file: Path) -> list[dict]:
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def to_json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
