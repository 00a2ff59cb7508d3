"""A study's pairs in the layouts that other tools load, with a data set card.

`python -m bpo export STUDY --to LAYOUT`. Lines are streamed, so memory does not grow with their
number. Nothing here makes or judges a pair.
"""

import argparse
import functools
import hashlib
import io
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from bpo.data import images
from bpo.data.check import image_root
from bpo.params import PairGeneration, Refusal, short
from bpo.study import stage as stages
from bpo.study.files import LineFile, to_json, whole, write_lines, write_whole
from bpo.study.text import visible

LAYOUTS = {  # name -> its file, and what it is
    "trl": ("train.parquet", "parquet with images inside, as TRL's DPOTrainer takes it"),
    "bpo": ("pairs.json", "the paper's release: a list of scored answers for each question"),
    "llama-factory": ("pairs.json", "ShareGPT ranking JSON with its dataset_info.json"),
    "ms-swift": ("pairs.jsonl", "JSON lines with rejected_response, for ms-swift's RLHF"),
    "parquet": ("train.parquet", "a row a pair with its image inside, for hubs and notebooks"),
}
ALTERNATING = ("llama-factory", "ms-swift")  # these skip or refuse a row whose turns do not
LLAMA_FACTORY = {"pairs": {
    "file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected",
                "images": "images"}}}
MEDIA = re.compile("<(image|video|audio)>")
TAGGED = "`<image>`, `<video>` or `<audio>`, where trainers put media"
RELEASE_TYPES = {"weakened": "mllm-hal", "injected": "llm-hal", "given": "given"}
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}
ENDINGS = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}  # of Pillow's formats, where they differ
GROUP_ROWS, GROUP_BYTES = 100, 64 * 2**20  # a row group of parquet ends at the first of these
HARMLESS = re.compile(r"[\w ,.:/{}\[\]\"()=+?-]+", re.ASCII)
LONGEST = 300  # characters of a text on the card
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")


@dataclass
class Tally:
    """What an export read, wrote and left out."""

    positives: int = 0  # lines read
    rows: int = 0  # lines written, each with its rejected answers
    kinds: Counter = field(default_factory=Counter)  # (source, mode, category) -> pairs
    left_out: Counter = field(default_factory=Counter)  # what and why -> how many
    example: dict[str, Any] | None = None  # the first line with a pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"  {name:14} {about}" for name, (_, about) in LAYOUTS.items())


def run(options: argparse.Namespace) -> int:
    print(f"the export is {short(export(options.study, options.to))}")
    return 0


def export(study: str, to: str) -> Path:
    """Writes a study's pairs into outputs/<study>/exports/<to>; returns that folder.

    to: a name of LAYOUTS. An older export of that name goes once the new one is complete. Raises
    Refusal when notebook 2 is not complete, its pairs were edited, an image cannot be used or there
    is no pair to write.
    """
    stage = stages.stage_folder(study, PairGeneration.notebook)
    if not (stage / stages.MANIFEST).is_file():
        raise Refusal(f"{stage} is not complete: make the pairs first (python -m bpo run {study} "
                      "--only 2)")
    folder = stage.parent / "exports" / to
    work = folder.with_name(f".{to}.tmp")
    with stages.locked(stage.parent / ".stage.lock", f"study {study} is being computed or exported "
                       "by another run; wait for it to end"):
        stages.fingerprint(stage / "pairs.jsonl")  # refuses pairs that were edited
        shutil.rmtree(work, ignore_errors=True)  # what a kill left
        try:
            (work / "new").mkdir(parents=True)
            _write(stage, to, work / "new")
            if folder.exists():
                folder.rename(work / "old")
            (work / "new").rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _write(stage: Path, to: str, folder: Path) -> None:
    manifest = stages.read_manifest(stage)
    # The parameters that the pairs were made with: the study's own may have changed since.
    root = image_root(PairGeneration(study=stage.parent.name, **manifest["parameters"])).resolve()
    file, tally = folder / LAYOUTS[to][0], Tally()
    copies = None if file.suffix == ".parquet" else folder
    # Rows of one image are neighbours: this spares reading it for each.
    stored = functools.lru_cache(maxsize=2)(lambda name: _stored(root, copies, name))
    rows = (row for line in usable(LineFile(stage / "pairs.jsonl"), to, tally)
            for row in _rows(to, line, stored(line["image"])))
    if file.suffix == ".parquet":
        write_parquet(file, rows, _schema(to))
    elif file.suffix == ".jsonl":
        write_lines(file, rows)
    else:
        with whole(file) as stream:  # a list, an element a line
            for number, row in enumerate(rows):
                stream.write((",\n" if number else "[\n") + to_json(row))
            stream.write("\n]\n")
    if not tally.kinds:
        reasons = "; ".join(f"{r}: {n}" for r, n in sorted(tally.left_out.items()))
        raise Refusal(f"{stage / 'pairs.jsonl'}: there is no pair to export ("
                      f"{reasons or 'the file is empty'}); change the parameters of notebook 2 and "
                      "run it again")
    if to == "llama-factory":
        write_whole(folder / "dataset_info.json", to_json(LLAMA_FACTORY, indent=1) + "\n")
    card(stage.parent.name, manifest, tally, to, folder).save(folder / "README.md")


def usable(lines: Iterable[dict], to: str, tally: Tally) -> Iterator[dict]:
    """The lines with the rejected answers that a layout can hold; the tally counts them all."""
    for line in lines:
        tally.positives += 1
        texts = (line["chosen"], *(m["content"] for m in line["prompt"]))
        if any(map(MEDIA.search, texts)):
            tally.left_out[f"positives whose text has {TAGGED}"] += 1
            continue
        if to in ALTERNATING and not alternates(line["prompt"]):
            tally.left_out["positives whose turns do not alternate"] += 1
            continue
        rejected = []
        for answer in line["rejected"]:
            if MEDIA.search(answer["text"]):
                tally.left_out[f"rejected answers that have {TAGGED}"] += 1
            elif answer["text"] == line["chosen"]:
                tally.left_out["rejected answers that equal the chosen one"] += 1
            else:
                rejected.append(answer)
        if not rejected and to != "bpo":  # the release has a place for a positive alone
            tally.left_out["positives without a rejected answer"] += 1
            continue
        line = {**line, "rejected": rejected}
        tally.rows += 1
        tally.kinds.update((a["source"], a.get("mode") or "", line["category"]) for a in rejected)
        tally.example = tally.example or (line if rejected else None)
        yield line


def alternates(prompt: list[dict[str, str]]) -> bool:
    """Whether user and assistant take turns, the user first and last and no turn empty, after at
    most one system message."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    return len(turns) % 2 == 1 and all(
        m["role"] == ("assistant" if number % 2 else "user") and m["content"].strip()
        for number, m in enumerate(turns))


def _stored(root: Path, folder: Path | None, name: str) -> Any:
    """An image with its bytes unchanged, as the Image feature of `datasets` stores it; with a
    folder, the path of its copy in there."""
    file = images.place(root, name)
    if file is None:
        raise Refusal(f"{name}: the image's path leaves the image folder {root}")
    if problem := images.problem(file):
        raise Refusal(f"{file}: {problem}; put the images that the pairs were made with back")
    source = images.source(file)
    data = source.read_bytes() if isinstance(source, Path) else source.read()
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
        ending = ENDINGS.get(image.format.lower(), image.format.lower())
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem)[:40].strip("-")
    # The hash of the full name keeps a/1.png and b/1.png apart.
    path = f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.{ending}"
    if folder is None:
        return {"bytes": data, "path": path}
    copy = folder / "images" / path
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(data)
        with (folder / "images.sha256").open("a", encoding="utf-8") as sums:
            sums.write(f"{hashlib.sha256(data).hexdigest()}  images/{path}\n")
    return f"images/{path}"


def _rows(to: str, line: dict, image: Any) -> list[dict]:
    """The rows of a layout that a line of pairs.jsonl becomes: one a pair, but one a line for bpo.

    image: as `_stored` gives it.
    """
    prompt, chosen, rejected = line["prompt"], line["chosen"], line["rejected"]
    texts = [answer["text"] for answer in rejected]
    if to == "trl":
        return [{"images": [image], "prompt": prompt,
                 "chosen": [{"role": "assistant", "content": chosen}],
                 "rejected": [{"role": "assistant", "content": text}]} for text in texts]
    if to == "bpo":
        text = prompt[0]["content"] if len(prompt) == 1 else "\n".join(
            f"{m['role'].upper()}: {m['content']}" for m in prompt)
        return [{"id": line["id"], "prompt": f"<image>\n{text}", "image": image, "completions": [
            {"score": 1, "response": chosen, "type": "gt"},
            *({"score": 0, "response": a["text"], "type": RELEASE_TYPES[a["source"]]}
              for a in rejected)]}]
    if to == "parquet":
        return [{"id": f"{line['id']}/{number}", "image": image, "question": prompt[-1]["content"],
                 "history": prompt[:-1], "chosen": chosen, "rejected": a["text"],
                 "source": a["source"], "mode": a.get("mode"), "category": line["category"]}
                for number, a in enumerate(rejected)]
    first = [m["role"] for m in prompt].index("user")  # a mark before what the user says first
    tagged = [{"role": m["role"], "content": "<image>" * (n == first) + m["content"]}
              for n, m in enumerate(prompt)]
    if to == "ms-swift":
        return [{"messages": [*tagged, {"role": "assistant", "content": chosen}],
                 "rejected_response": text, "images": [image]} for text in texts]
    turns = [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in tagged]
    return [{"conversations": turns, "chosen": {"from": "gpt", "value": chosen},
             "rejected": {"from": "gpt", "value": text}, "images": [image]} for text in texts]


def _schema(to: str) -> pyarrow.Schema:
    """With the features, so that `datasets` gives pictures and not bytes."""
    from datasets import Features, Image, List, Value  # slow to import

    text = Value("string")
    messages = List({"role": text, "content": text})
    return Features(
        {"images": List(Image()), "prompt": messages, "chosen": messages, "rejected": messages}
        if to == "trl" else
        {"id": text, "image": Image(), "question": text, "history": messages, "chosen": text,
         "rejected": text, "source": text, "mode": text, "category": text}).arrow_schema


def write_parquet(file: Path, rows: Iterable[dict], schema: pyarrow.Schema) -> None:
    """Rows with `image` or `images`, in row groups small enough to be read one by one.

    The large dictionary page stores an image once where several rows of a group have it;
    statistics would store small images four times more.
    """
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


def card(study: str, manifest: Mapping[str, Any], tally: Tally, to: str, folder: Path
         ) -> DatasetCard:
    """The data set card of the data files in a folder, from the manifest of notebook 2.

    It holds no time and no machine's paths, so the same pairs give the same bytes.
    """
    count = tally.rows if to == "bpo" else tally.kinds.total()
    head = DatasetCardData(
        pretty_name=f"Preference pairs of study {study}", license="unknown",
        task_categories=["image-text-to-text"],
        size_categories=[SIZES[min(max(len(str(count)) - 3, 0), len(SIZES) - 1)]],
        tags=["preference", "dpo", "multimodal", "synthetic"],
        configs=[{"config_name": "default", "data_files": [
            {"split": "train", "path": LAYOUTS[to][0]}]}])
    return DatasetCard.from_template(
        head, template_path=str(Path(__file__).parent / "card.md.j2"), to=to,
        about=LAYOUTS[to][1], study=study, tally=tally, manifest=manifest, literal=literal,
        public=public,
        hashes={f.name: stages.file_hash(f) for f in sorted(folder.iterdir()) if f.is_file()})


def literal(value: Any) -> str:
    """A value as text that neither Markdown, HTML nor TeX reads as anything else, on one line.

    A harmless text becomes a code span; of others, all but letters, digits, spaces, commas and
    hyphens become character references, so that nothing is a tag, a link or a formula.
    """
    text = value if isinstance(value, str) else to_json(value)
    if not text:
        return "(empty)"
    text = " ".join(visible(text[:LONGEST]).split()) + " ..." * (len(text) > LONGEST)
    if HARMLESS.fullmatch(text):
        return f"`{text}`"
    return "<code>" + re.sub(r"[^\w ,-]|_", lambda c: f"&#{ord(c[0])};", text) + "</code>"


def public(value: Any) -> Any:
    """A parameter without the folders above a file and without the name and password in a URL."""
    if isinstance(value, Mapping):
        return {public(k): public(v) for k, v in value.items()}
    if isinstance(value, list):
        return [public(v) for v in value]
    if isinstance(value, str) and "://" in value:
        return re.sub(r"\?.*", "", re.sub(r"//[^/]*@", "//", value), flags=re.DOTALL)
    if isinstance(value, str) and re.match(r"/|~|[A-Za-z]:[\\/]|\.\.", value):
        return ".../" + re.split(r"[\\/]", value.rstrip("/\\"))[-1]
    return value
