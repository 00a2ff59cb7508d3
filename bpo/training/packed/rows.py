"""Which rows of a preference data set are trained on, and in which order: those that can teach
something and fit, the rows of one positive together."""

import hashlib
import json
import pickle
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from PIL import Image
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.image_utils import load_image
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from bpo.data.images import upright_size
from bpo.models import encoding
from bpo.models.checkpoint import Checkpoint

# What the rows of one positive share.
SAME = ("image", "images", "prompt", "chosen", "completion", "tools", "chat_template_kwargs")
TEXTS = ("prompt", "chosen", "rejected")


class Survey(NamedTuple):
    """Of a data set: the rows that fit, the `families` among them, and the numbers of the rows to
    try packing with: of those that the decoder's window holds the longest without and with pictures
    (if there are such), and two rows of different positives in a family (if there are such)."""

    rows: Dataset
    families: list[list[list[int]]]
    tried: list[list[int]]


def survey(dataset: Dataset, dropped: Counter, processor: Any, limit: int | None,
           window: int | None, share: str = "prompt") -> Survey:
    """processor: that of a vision-language model; None for a data set that TRL tokenized. Without a
    limit in tokens the longest row is that of the most stored characters, which are at hand."""
    if processor is None:
        names = ["prompt_ids", "chosen_ids", "rejected_ids"]
        columns = dataset.select_columns(names).with_format("arrow")[:]
        prompt, chosen, rejected = (
            pyarrow.compute.list_value_length(columns[n]).to_pylist() for n in names)
        sizes = [Size(p + max(c, r), False)
                 for p, c, r in zip(prompt, chosen, rejected, strict=True)]
    elif limit is None:
        sizes = [Size(len(str([row[n] for n in TEXTS if n in row])), bool(pictures(row)))
                 for row in _stored(dataset)]
    else:
        # What a transform makes of a row is known when it is made.
        stored = dataset if dataset.format["type"] == "custom" else _stored(dataset)
        sizes = list(map(Sizes(processor, limit), stored))
    kept = [n for n, size in enumerate(sizes) if limit is None or size.length <= limit]
    rows = _taken(dataset, kept, Counter({_too_long(limit): len(sizes) - len(kept)}), dropped)
    in_tokens = processor is None or limit is not None
    sizes = [sizes[n] for n in kept]
    held = {n for n, size in enumerate(sizes)
            if window is None or not in_tokens or size.length <= window}

    def longest(numbers: Iterable[int]) -> list[int]:
        held_ones = sorted(held.intersection(numbers))
        return [max(held_ones, key=lambda n: sizes[n].length)] if held_ones else []

    def pictured(kind: bool) -> list[int]:
        return longest(n for n, size in enumerate(sizes) if size.pictured == kind)

    found = families(rows, share)
    pairs = ([n for positive in family for n in longest(positive)][:2]
             for family in found if len(family) > 1)
    tried = pictured(False), pictured(True), next((p for p in pairs if len(p) == 2), [])
    return Survey(rows, found, list(filter(None, tried)))


def without(dataset: Dataset | IterableDataset, why: Callable[[Mapping[str, Any]], str],
            dropped: Counter) -> Dataset | IterableDataset:
    """The data set without the rows of which `why` says a reason, counted in `dropped` by reason;
    of a stream, as they come, and in this process alone."""
    if isinstance(dataset, IterableDataset):
        def fits(row: Mapping[str, Any]) -> bool:
            reason = why(row)
            if reason and reason not in dropped:
                PartialState().print(f"Rows of the stream are left out: {reason}.")
            dropped.update([reason] if reason else [])
            return not reason

        return dataset.filter(fits)
    reasons = [why(row) for row in _stored(dataset)]
    kept = [n for n, reason in enumerate(reasons) if not reason]
    return _taken(dataset, kept, Counter(filter(None, reasons)), dropped)


def _taken(dataset: Dataset, kept: Sequence[int], left: Counter, dropped: Counter) -> Dataset:
    left = +left
    dropped.update(left)
    said = [f"{count} of {len(dataset)} rows are left out: {why}" for why, count in left.items()]
    if not kept and len(dataset):
        raise ValueError(f"no row is left to train on: {'; '.join(said)}")
    for sentence in said:
        PartialState().print(f"{sentence}.")
    return dataset.select(kept) if said else dataset


def flaw(row: Mapping[str, Any]) -> str:
    """Why a row, as it is stored, can teach nothing; "" if it can."""
    if "rejected" in row and row["rejected"] == row.get("chosen"):
        return "the rejected answer is the chosen one"
    for name in {"chosen", "rejected", "prompt"} & row.keys():
        if _empty(row[name]):
            return f"the {'question' if name == 'prompt' else f'{name} answer'} is empty"
    if any(p is None or p == {"bytes": None, "path": None} for p in pictures(row, (None,))):
        return "the picture is missing"
    return ""


def _empty(value: Any) -> bool:
    """Whether a text, or the last of some messages, says nothing."""
    if isinstance(value, list) and value:
        if value[-1].get("tool_calls"):
            return False
        value = value[-1].get("content")
        if isinstance(value, list):
            value = " ".join(part.get("text") or "" for part in value)
    return not (value and value.strip())


def too_long(processor: Any, limit: int) -> Callable[[Mapping[str, Any]], str]:
    """Says of a row of a stream whether it is longer than `limit` tokens."""
    size = Sizes(processor, limit)
    return lambda row: _too_long(limit) if size(row).length > limit else ""


def _too_long(limit: int | None) -> str:
    return f"longer than max_length = {limit} tokens"


class Size(NamedTuple):
    """A row's length, of its prompt, images and longer answer, and whether it has pictures."""

    length: int
    pictured: bool


class Sizes:
    """Sizes of rows in tokens; of pictures the file's header is read alone. See `survey`.

    A text has no more tokens than bytes. A row that fits even so is not rendered and tokenized, and
    its length is that bound.
    """

    def __init__(self, processor: Any, limit: int):
        self.processor, self.limit = processor, limit
        self.lengths = encoding.Lengths(Checkpoint(None, processor))
        self.templates: dict[tuple, int] = {}  # roles of the turns -> what their template adds

    def __call__(self, row: Mapping[str, Any]) -> Size:
        if self.processor is None:
            return Size(len(row["prompt_ids"]) + max(len(row["chosen_ids"]),
                                                     len(row["rejected_ids"])), False)
        images = pictures(row)
        shown = tuple(map(_size, images))
        texts = {n: row[n] for n in TEXTS}
        turns = tuple(tuple(m["role"] for m in t) if isinstance(t, list) else ()
                      for t in texts.values())
        own = {n: row[n] for n in ("tools", "chat_template_kwargs") if row.get(n)}
        if not own and turns in self.templates and (not shown or shown in self.lengths.added):
            prompt, *answers = map(_bytes, texts.values())
            bound = (prompt + max(answers) + self.templates[turns]
                     + self.lengths.added.get(shown, 0))
            if bound <= self.limit:
                return Size(bound, bool(images))
        if is_conversational(texts):
            texts = apply_chat_template(own | {
                n: prepare_multimodal_messages(t, **({"images": images} if n == "prompt" else {}))
                for n, t in texts.items()}, self.processor)
        length = self.lengths(texts["prompt"], shown, [texts["chosen"], texts["rejected"]])
        self.templates.setdefault(turns, length - self.lengths.added.get(shown, 0))
        return Size(length, bool(images))


def weighted(dataset: Any) -> bool:
    """Whether pairs have a column `weight`."""
    columns = getattr(dataset, "column_names", None)
    return "weight" in (next(iter(dataset), {}) if columns is None and dataset is not None
                        else columns or ())


def _bytes(value: Any) -> int:
    """The bytes of all text in a value."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, list) else 0


def pictures(row: Mapping[str, Any], none: Sequence[Any] = ()) -> Sequence[Any]:
    """A row's pictures; `none` where its list of them is missing."""
    if "image" in row:
        return [row["image"]]
    return row.get("images", ()) if row.get("images", ()) is not None else none


def digest(value: Any) -> str:
    """A hash of a value's own content."""
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


def _size(picture: Any) -> tuple[int, int]:
    """Width and height as the model is shown a picture, from its file's header alone."""
    if isinstance(picture, Mapping):
        content = picture.get("bytes")
        picture = picture["path"] if content is None else BytesIO(content)
    if isinstance(picture, str) and not Path(picture).is_file():
        picture = load_image(picture)  # an address, or base64
    if isinstance(picture, Image.Image):
        return picture.size
    with Image.open(picture) as image:
        return upright_size(image)


def families(dataset: Dataset, share: str) -> list[list[list[int]]]:
    """The rows of each positive: those that share image, prompt and chosen answer, in their order;
    with share "image" the positives of one image together, else each alone. With "row" every row
    is a positive by itself.

    Compared as they are stored: an image by its file's name and bytes, not by its pixels. Rows for
    SFT, which have a completion in place of both answers, are told apart by it.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for number, row in enumerate(_stored(dataset)):
        for name in ("rejected", "rejected_ids"):
            row.pop(name, None)
        shown = list(pictures(row))
        positive = str(number) if share == "row" else digest(list(row.items()))
        family = digest(shown) if share == "image" and shown else positive
        groups.setdefault(family, {}).setdefault(positive, []).append(number)
    return [list(family.values()) for family in groups.values()]


def _stored(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Rows as they are stored: no picture decoded, no transform done. Messages of many forms, which
    a data set keeps as JSON, are messages again."""
    names = [n for n in (*SAME, "rejected") if n in dataset.column_names] or dataset.column_names
    raw = dataset.select_columns(names).with_format("arrow")
    return ({n: _messages(v) for n, v in row.items()}
            for table in raw.iter(batch_size=64) for row in table.to_pylist())


def _messages(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [json.loads(m) if isinstance(m, str) and m.startswith("{") else m for m in value]


class PositiveSampler(Sampler[int]):
    """Families in random order, their positives in turn, the rows of each within one batch. One
    that does not fit into what is left of a batch waits for the next; only one larger than a batch,
    and what is left over at the end, is spread over several."""

    def __init__(self, families: Sequence[Sequence[Sequence[int]]], *, batch: int, seed: int):
        self.families, self.batch, self.seed, self.epoch = families, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(positive) for family in self.families for positive in family)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = deque(positive for i in torch.randperm(len(self.families), generator=generator)
                      for positive in self.families[i])
        waiting: deque[Sequence[int]] = deque()
        room = self.batch
        while order or waiting:
            # One that waits goes first: none is put off for ever.
            group = next((w for w in waiting if len(w) <= room), None)
            if group is not None:
                waiting.remove(group)
            elif order:
                group = order.popleft()
                if len(group) > room and room < self.batch:
                    waiting.append(group)
                    continue
            else:
                group = waiting.popleft()
            yield from group
            room = (room - len(group) - 1) % self.batch + 1


def sampler(families: Sequence[Sequence[Sequence[int]]], args: TrainingArguments, *, batch: int
            ) -> PositiveSampler | None:
    """The order of training rows that keeps families together; None where the trainer's own does:
    all rows stand alone, or the order is not to be random."""
    if args.train_sampling_strategy != "random" or all(
            len(family) == len(family[0]) == 1 for family in families):
        return None
    return PositiveSampler(families, batch=batch,
                           seed=args.seed if args.data_seed is None else args.data_seed)
