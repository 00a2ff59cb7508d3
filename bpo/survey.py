"""What a checkpoint and a data set hold, before anything is loaded or run.

The checkpoint's config, processor and the headers of its weights are read, every row of the data as
notebook 2 reads it, and pictures are opened.
"""

import hashlib
import json
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from bpo import check
from bpo.data import images, layouts
from bpo.data import rows as data_rows
from bpo.data.rows import Rejected, Row
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding
from bpo.params import Refusal, short
from bpo.study.seeds import seed_for

SEED = 0  # of every draw that a new study's rows and pictures go through
OPENED = 2000  # pictures that are opened, drawn by seed; notebook 2 opens all
NAMED = 5  # bad rows that are named on the screen
LARGE = 1e9  # weights


@dataclass(frozen=True)
class Model:
    """A checkpoint, its weights not loaded. reader: what `encoding` asks of it, without a model."""

    folder: Path
    name: str
    weights: int
    skeleton: Any  # the model without memory for its weights
    precision: str
    positions: int  # tokens that it can tell the order of
    reader: checkpoints.Checkpoint


@dataclass(frozen=True)
class Data:
    """What a data set holds.

    root: the folder that image names start from, resolved.
    rows: (where its entry stands, number of its picture, category) of each row that can be used.
    pictures: what tells each picture from others, by number: a hash of its bytes, its name where
    there are too many to open.  opened: how many were.  sizes: (width, height) of those.
    longest: the row with the longest prompt and the one with the longest answer.
    """

    file: Path
    root: Path
    layout: str
    rows: list[tuple[str, int, str]]
    rejected: list[Rejected]
    pictures: dict[int, str]
    opened: int
    sizes: set[tuple[int, int]]
    example: Row
    longest: tuple[Row, Row]
    given: bool

    @property
    def distinct(self) -> set[str]:
        return set(self.pictures.values())


def look_at_model(folder: Path) -> Model:
    """Raises Refusal where the folder is not a checkpoint that `models.load` could load."""
    config = _config(folder)
    kind = config.get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise Refusal(f"{folder}: model_type is {kind!r}, " + (
            "which needs the checkpoint's own code, and such code is never run here"
            if "auto_map" in config else "which is not a vision-language model that transformers "
            f"{transformers.__version__} knows") + "; give another checkpoint")
    _check_weights(folder)
    skeleton = check.skeleton(folder)
    weights = skeleton.num_parameters()
    try:
        processor = checkpoints.load_processor(folder)
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder}: the processor cannot be read: {str(error).splitlines()[0]}; get "
                      "the checkpoint's other files too") from None
    lost = next((what for what, there in (
        ("image processor (preprocessor_config.json)", hasattr(processor, "image_processor")),
        ("chat template", getattr(processor, "chat_template", None))) if not there), None)
    if lost:
        raise Refusal(f"{folder}: the checkpoint has no {lost}; get it whole, or one that has it")
    loaded = transformers.AutoConfig.from_pretrained(folder)
    half = loaded.dtype in (torch.float16, torch.bfloat16) or weights >= LARGE
    transform = "pad" if kind == "llava" else "processor"
    return Model(folder, ", ".join(config.get("architectures") or [kind]), weights, skeleton,
                 "bfloat16" if half else "float32",
                 getattr(loaded.get_text_config(), "max_position_embeddings", None) or 2**17,
                 checkpoints.Checkpoint(None, processor, transform))


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise Refusal(f"{folder}: there is no such folder; --model is the folder that a checkpoint "
                      "was downloaded into")
    file = folder / "config.json"
    if not file.is_file():
        raise Refusal(f"{folder}: holds no config.json, so it is no checkpoint" + (
            " but an adapter; merge it into its model first"
            if (folder / "adapter_config.json").is_file() else "; give the folder that has one"))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise Refusal(f"{file}: is not a JSON object; get the checkpoint again")
    return config


def _check_weights(folder: Path) -> None:
    """Raises Refusal where the weights are not whole safetensors files; reads their headers."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(named)]
    if not files:
        other = next((f.name for p in ("*.bin", "*.pt", "*.pth") for f in folder.glob(p)), None)
        raise Refusal(f"{folder}: holds no weights as safetensors"
                      + (f", only {other}, which can run code when it is read" if other else "")
                      + "; get the safetensors files of this checkpoint")
    for file in files:
        try:
            with safetensors.safe_open(file, "pt"):
                pass
        except (safetensors.SafetensorError, OSError):
            raise Refusal(f"{file}: the weights are missing, cut off or a pointer to them; get "
                          "this file again") from None


def look_at_data(file: Path, image_folder: Path | None) -> Data:
    """The rows of a data set and its pictures, up to OPENED of them opened.

    Raises Refusal when the data cannot be read or none of its rows can be used.
    """
    root = data_rows.image_root(file, image_folder)
    layout = data_rows.layout(file)
    rows, rejected, numbers, names = [], [], {}, []
    firsts: list[Row] = []
    longest = None
    given = False
    for where, row in tqdm(data_rows.located(file, root), desc="reading rows", unit=" rows",
                           leave=False, disable=None):
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        if row.image not in numbers:
            numbers[row.image] = len(names)
            names.append(row.image_name)
            firsts += [row] if len(firsts) < OPENED else []
        longest = longest or (row, row)
        longest = (max(longest[0], row, key=_prompt_length),
                   max(longest[1], row, key=lambda r: len(r.answer)))
        given |= bool(row.given)
        rows.append((where, numbers[row.image], row.category, row.id))
    some = sorted(numbers, key=lambda f: seed_for(SEED, "opened", names[numbers[f]]))[:OPENED]
    files = sorted(some, key=numbers.get)
    problems = {numbers[f]: reason for f, reason in zip(files, tqdm(
        images.problems(files), total=len(files), desc="opening pictures", leave=False,
                                 disable=None), strict=True) if reason}
    rejected += [Rejected(name, where, problems[n]) for where, n, _, name in rows if n in problems]
    rows = [(where, n, category) for where, n, category, _ in rows if n not in problems]
    if not rows:
        raise Refusal(f"{file}: none of its {len(rejected)} rows can be used: {reasons(rejected)}"
                      f"; image names start from {root}, give --image-folder if that is wrong")
    opened = [f for f in files if numbers[f] not in problems]
    whole = len(files) == len(numbers)
    return Data(file, root, layout, rows, rejected,
                {n: _digest(f) if whole else names[n] for f, n in numbers.items()
                 if n not in problems},
                len(opened), {_size(f) for f in opened},
                next((r for r in firsts if numbers[r.image] not in problems), firsts[0]),
                longest, given)


def look_at_held_out(file: Path, image_folder: Path | None) -> Data:
    """As `look_at_data`; held-out pictures may lie below the image folder or beside their rows."""
    try:
        return look_at_data(file, image_folder)
    except Refusal:
        if image_folder is None:
            raise
    return look_at_data(file, None)


def _prompt_length(row: Row) -> int:
    return sum(len(m["content"]) for m in row.prompt)


def _digest(file: Path) -> str:
    source = images.source(file)
    data = source.read_bytes() if isinstance(source, Path) else source.read()
    return hashlib.sha256(data).hexdigest()


def _size(file: Path) -> tuple[int, int]:
    with Image.open(images.source(file), formats=images.FORMATS) as image:
        return image.size


def reasons(rejected: Sequence[Rejected]) -> str:
    """How many rows each reason kept out, in words."""
    return data_rows.told(Counter(r.reason for r in rejected))


def answer_tokens(model: Model, data: Data) -> int:
    """Tokens of the answer that has the most characters."""
    row = data.longest[1]
    return len(encoding.answer_tokens(model.reader, row.prompt, row.answer))


def prompt_tokens(model: Model, data: Data, *, text: bool = True) -> int:
    """Tokens of the longest prompt with the largest picture, or (text False) of the picture."""
    prompt = encoding.prompt_text(model.reader, data.longest[0].prompt, image=True)
    largest = Image.new("RGB", max(data.sizes, key=math.prod))
    whole = encoding.encode(model.reader, prompt, largest)["input_ids"].shape[1]
    # One placeholder stands in the text already.
    return whole if text else whole - len(encoding.answer_ids(model.reader, prompt)) + 1


def told_model(model: Model) -> list[str]:
    """Lines for the screen: what the checkpoint is."""
    weights = model.weights
    count = f"{weights / 1e9:.2f} billion" if weights >= LARGE else f"{weights / 1e6:.1f} million"
    return [f"model     {short(model.folder)}: {model.name}, {count} weights, safetensors; "
            f"precision {model.precision}, image_transform {model.reader.transform}"]


def told_data(title: str, data: Data) -> list[str]:
    """Lines for the screen: what the data set holds, an example, and the rows left out."""
    total = len(data.rows) + len(data.rejected)
    found = Counter(category for *_, category in data.rows)
    wide, high = zip(*data.sizes, strict=True)
    looked = f"{data.opened:,} opened" if data.opened < len(data.pictures) else "all opened"
    said = [
        f"{title:10}{short(data.file)}: {len(data.rows):,} of {counted(total, 'row')} can be used, "
        f"about {counted(len(data.distinct), 'picture')} ({looked}, {min(wide)} to {max(wide)} "
        f"pixels wide, {min(high)} to {max(high)} high)",
        f"          layout {data.layout}: {layouts.LAYOUTS[data.layout].shape}",
        "          categories: " + ", ".join(f"{n:,} {c}" for c, n in found.most_common()),
        f"          for instance {data.example.image_name}: {_cut(data.example.question)!r} "
        f"answered {_cut(data.example.answer)!r}"]
    if data.rejected:
        said += [f"          {counted(len(data.rejected), 'row')} left out: "
                 f"{reasons(data.rejected)}",
                 *(f"            {r.where}: {r.reason}" for r in data.rejected[:NAMED]),
                 *(["            ..."] if len(data.rejected) > NAMED else [])]
    return said


def counted(count: int, thing: str) -> str:
    """A count and its noun: 1 row, 2,000 rows."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _cut(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder=" ...")
