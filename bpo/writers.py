"""The files of an export: how lines of pairs.jsonl become what a tool loads.

Writers take lines one at a time and write them as they come. They leave nothing out and know no
stage: exports.py gives them the lines that their layout can hold.
"""

import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from bpo import images
from bpo.params import Refusal
from bpo.records import to_json

if TYPE_CHECKING:
    from datasets import Features

RELEASE_TYPES = {"weakened": "mllm-hal", "injected": "llm-hal", "given": "given"}
ENDINGS = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}  # of Pillow's formats, where they differ
GROUP_ROWS, GROUP_BYTES = 100, 64 * 2**20  # a row group of parquet ends at the first of these


class Images:
    """The images that pairs name, for one export: their bytes, or copies below its images/."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root.resolve(), folder
        # Rows of one image are neighbours: this spares reading it for each.
        self.load = functools.lru_cache(maxsize=2)(self._load)

    def _load(self, name: str) -> tuple[bytes, str]:
        """An image's bytes as they lie in its file or parquet, and its name in the export."""
        file = images.place(self.root, name)
        if file is None:
            raise Refusal(f"{name}: the image's path leaves the image folder {self.root}")
        problem = images.problem(file)
        if problem:
            raise Refusal(f"{file}: {problem}; name the folder that the pairs' image names start "
                          "from, with the images that the pairs were made with")
        source = images.source(file)
        data = source.read_bytes() if isinstance(source, Path) else source.read()
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            ending = ENDINGS.get(image.format.lower(), image.format.lower())
        # The hash of the whole name keeps a/1.png and b/1.png apart.
        stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem)[:40].strip("-")
        return data, f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.{ending}"

    def embed(self, name: str) -> dict[str, Any]:
        """The image as the Image feature of Hugging Face's datasets stores it."""
        data, path = self.load(name)
        return {"bytes": data, "path": path}

    def copy(self, name: str) -> str:
        """Copies the image, its bytes unchanged, unless it is there; its path in the export."""
        data, path = self.load(name)
        file = self.folder / "images" / path
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
            with (self.folder / "images.sha256").open("a", encoding="utf-8") as sums:
                sums.write(f"{hashlib.sha256(data).hexdigest()}  images/{path}\n")
        return f"images/{path}"


def _flat(lines: Iterable[dict]) -> Iterator[tuple[dict, dict]]:
    return ((line, answer) for line in lines for answer in line["rejected"])


def _with_tag(prompt: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with <image> before what the user says first."""
    first = next(number for number, m in enumerate(prompt) if m["role"] == "user")
    return [{"role": m["role"], "content": "<image>" * (number == first) + m["content"]}
            for number, m in enumerate(prompt)]


# --- parquet ------------------------------------------------------------------------------------

def _write_trl(lines: Iterator[dict], found: Images, folder: Path) -> None:
    from datasets import Features, Image, List, Value  # slow to import

    messages = List({"role": Value("string"), "content": Value("string")})
    _write_parquet(folder / "train.parquet", Features(
        {"images": List(Image()), "prompt": messages, "chosen": messages, "rejected": messages}),
        ({"images": [found.embed(line["image"])], "prompt": line["prompt"],
          "chosen": [{"role": "assistant", "content": line["chosen"]}],
          "rejected": [{"role": "assistant", "content": answer["text"]}]}
         for line, answer in _flat(lines)))


def _write_flat(lines: Iterator[dict], found: Images, folder: Path) -> None:
    from datasets import Features, Image, List, Value  # slow to import

    text = Value("string")
    _write_parquet(folder / "train.parquet", Features(
        {"id": text, "image": Image(), "question": text,
         "history": List({"role": text, "content": text}), "chosen": text, "rejected": text,
         "source": text, "mode": text, "category": text}),
        ({"id": f"{line['id']}/{number}", "image": found.embed(line["image"]),
          "question": line["prompt"][-1]["content"], "history": line["prompt"][:-1],
          "chosen": line["chosen"], "rejected": answer["text"], "source": answer["source"],
          "mode": answer.get("mode"), "category": line["category"]}
         for line in lines for number, answer in enumerate(line["rejected"])))


def _write_parquet(file: Path, features: "Features", rows: Iterable[dict]) -> None:
    """Rows with `image` or `images`, in row groups small enough to be held and read one by one.

    The schema carries the features, so that `datasets` gives pictures and not bytes. The large
    dictionary page stores an image once where several rows of a group have it; statistics would
    store small images four times more.
    """
    schema = features.arrow_schema
    with pyarrow.parquet.ParquetWriter(file, schema, write_statistics=False,
                                       dictionary_pagesize_limit=GROUP_BYTES) as writer:
        group, size = [], 0
        for row in rows:
            group.append(row)
            size += sum(len(i["bytes"]) for i in row.get("images") or [row["image"]])
            if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
                writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
                group, size = [], 0
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


# --- JSON ---------------------------------------------------------------------------------------

def _write_list(file: Path, rows: Iterable[dict]) -> None:
    """A JSON list, an element a line, written as the rows come."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write("[")
        for number, row in enumerate(rows):
            stream.write((",\n" if number else "\n") + to_json(row))
        stream.write("\n]\n")


def _write_release(lines: Iterator[dict], found: Images, folder: Path) -> None:
    _write_list(folder / "pairs.json", (
        {"id": line["id"], "prompt": release_prompt(line["prompt"]),
         "image": found.copy(line["image"]),
         "completions": [{"score": 1, "response": line["chosen"], "type": "gt"},
                         *({"score": 0, "response": a["text"], "type": RELEASE_TYPES[a["source"]]}
                           for a in line["rejected"])]}
        for line in lines))


def release_prompt(prompt: list[dict[str, str]]) -> str:
    """The question behind <image>; with earlier turns a line a turn, each behind its role."""
    if len(prompt) == 1:
        return f"<image>\n{prompt[0]['content']}"
    return "<image>\n" + "\n".join(f"{m['role'].upper()}: {m['content']}" for m in prompt)


def _write_llama_factory(lines: Iterator[dict], found: Images, folder: Path) -> None:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    _write_list(folder / "pairs.json", (
        {"conversations": [{"from": names[m["role"]], "value": m["content"]}
                           for m in _with_tag(line["prompt"])],
         "chosen": {"from": "gpt", "value": line["chosen"]},
         "rejected": {"from": "gpt", "value": answer["text"]},
         "images": [found.copy(line["image"])]}
        for line, answer in _flat(lines)))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected",
               "images": "images"}
    (folder / "dataset_info.json").write_text(to_json(
        {"pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
                   "columns": columns}}, indent=1) + "\n", encoding="utf-8")


def _write_ms_swift(lines: Iterator[dict], found: Images, folder: Path) -> None:
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as stream:
        for line, answer in _flat(lines):
            stream.write(to_json(
                {"messages": [*_with_tag(line["prompt"]),
                              {"role": "assistant", "content": line["chosen"]}],
                 "rejected_response": answer["text"],
                 "images": [found.copy(line["image"])]}) + "\n")


WRITERS: dict[str, Callable[[Iterator[dict], Images, Path], None]] = {
    "trl": _write_trl, "bpo": _write_release, "llama-factory": _write_llama_factory,
    "ms-swift": _write_ms_swift, "parquet": _write_flat}
