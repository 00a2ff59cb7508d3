"""Batches of preference rows for the packed step: rows of one positive kept together, each image
through the processor once, and where every token goes when the rows are packed."""

import hashlib
import json
import pickle
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import Sampler
from transformers import TrainingArguments
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from bpo.models import encoding, prefix
from bpo.models.checkpoint import Checkpoint

SAME = ("image", "images", "prompt", "chosen", "completion")  # what one positive's rows share


def positives(dataset: Dataset) -> list[list[int]]:
    """The rows of each positive: those that share image, prompt and chosen answer, in their order.

    Compared as they are stored: an image by its file's name and bytes, not by its pixels. Raises
    ValueError for a row whose rejected answer is the chosen one, which would train on nothing.
    Rows for SFT, which have a completion in place of both answers, are told apart by it.
    """
    groups: dict[str, list[int]] = {}
    names = [n for n in (*SAME, "rejected") if n in dataset.column_names]
    raw = dataset.select_columns(names).with_format("arrow")
    stored = (row for table in raw.iter(batch_size=64) for row in table.to_pylist())
    for number, row in enumerate(stored):
        if "rejected" in row and row.pop("rejected") == row["chosen"]:
            raise ValueError(f"row {number} of the data set: the rejected answer is the chosen "
                             "one, which would train on nothing; remove the row")
        groups.setdefault(_hash(list(row.items())), []).append(number)
    return list(groups.values())


class PositiveSampler(Sampler[int]):
    """Positives in random order, the rows of each within one batch. One that does not fit into what
    is left of a batch waits for the next; only one larger than a batch, and what is left over at
    the end, is spread over several."""

    def __init__(self, groups: Sequence[Sequence[int]], *, batch: int, seed: int):
        self.groups, self.batch, self.seed, self.epoch = groups, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = deque(self.groups[i] for i in torch.randperm(len(self.groups), generator=generator))
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


def sampler(groups: Sequence[Sequence[int]], args: TrainingArguments, *, batch: int
            ) -> PositiveSampler | None:
    """The order of training rows that keeps positives together; None where the trainer's own does:
    all stand alone, or the order is not to be random."""
    if args.train_sampling_strategy != "random" or all(len(g) == 1 for g in groups):
        return None
    return PositiveSampler(groups, batch=batch,
                           seed=args.seed if args.data_seed is None else args.data_seed)


class Numbered(torch.utils.data.Dataset):
    """A data set whose rows know their number, for messages and to be read once more."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__(numbers)
        return [{**row, "row": n} for row, n in zip(rows, numbers, strict=True)]


class _OnceEach:
    """A processor that is given every prompt of a batch once, with its images, and hands out the
    tokens as often as they were asked for. Pixels stay those of the distinct prompts."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.rows: list[int] = []  # for every text asked for, which distinct prompt it is

    def __getattr__(self, name: str) -> Any:
        if name == "processor" or name.startswith("__"):  # while a copy of this is being made
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        if "images" not in kwargs:  # answers
            return self.processor(text=text, **kwargs)
        first = [self.rows.index(g) for g in range(max(self.rows) + 1)]
        if kwargs["images"] is not None:
            kwargs["images"] = [kwargs["images"][i] for i in first]
        out = self.processor(text=[text[i] for i in first], **kwargs)
        shape = out["input_ids"].shape
        for name, values in out.items():
            if values.shape == shape:
                out[name] = values[self.rows]
        return out


class PackedCollator:
    """TRL's batch of preference rows, and with `packed` where its tokens go in packed rows.

    Around one of TRL's own preference collators, for images or for tokens. The batch is TRL's to
    the value (2B sequences, chosen before rejected), except that pixels come once for every
    distinct prompt and image. Also in it: "row", the rows' numbers, if they have any, and "keys", a
    hash of all that an answer's log-prob depends on but the model, for every sequence, if asked.
    """

    def __init__(self, stock: Any):
        self.vision = isinstance(stock, DataCollatorForVisionPreference)
        # What would be cut is dropped before: see `PackedDPOTrainer`.
        self.stock, self.once = (replace(stock, max_length=None) for _ in range(2))
        if self.vision:
            self.once.processor = _OnceEach(stock.processor)
        self.packing, self.dense, self.keyed, self.damaged = True, False, False, False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.damaged and not all("damaged_images" in r for r in rows):
            raise ValueError("an objective compares an image with a damaged one: the rows want a "
                             "column damaged_images")
        pairs = [{n: v for n, v in r.items() if n not in ("row", "damaged_images")} for r in rows]
        batch = self._batch(pairs)
        if self.damaged:
            # Twice the chosen answer, which costs nothing: equal answers are computed once.
            batch["damaged"] = self._batch([
                {**{n: v for n, v in pair.items() if n != "image"}, "images": r["damaged_images"],
                 "rejected": pair["chosen"]} for pair, r in zip(pairs, rows, strict=True)])
        if "row" in rows[0]:
            batch["row"] = [r["row"] for r in rows]
        return batch

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [dict(r) for r in rows]  # TRL's collators write into what they are given
        prompts = [_prompt(r, vision=self.vision) for r in rows]
        if self.packing:
            numbers: dict[Hashable, int] = {}
            groups = [numbers.setdefault(p, len(numbers)) for p in prompts]
            if self.vision:
                self.once.processor.rows = groups * 2
            batch = dict(self.once(rows))
            batch["packed"] = self._placed(batch, groups)
        else:
            batch = dict(self.stock(rows))
        if self.keyed:
            batch["keys"] = _keys(batch, prompts * 2, self.stock)
        return batch

    def _placed(self, batch: dict[str, torch.Tensor], groups: Sequence[int]) -> dict[str, Any]:
        """Where the tokens go; every answer is a branch of its prompt, equal ones the same."""
        spans = [_span(m, c) for m, c in zip(batch["attention_mask"].bool(),
                                             batch["completion_mask"].bool(), strict=True)]
        answers = [tuple(ids[begin:end].tolist()) for ids, (_, begin, end)
                   in zip(batch["input_ids"], spans, strict=True)]
        return prefix.layout(spans, list(zip(groups * 2, answers, strict=True)),
                             width=batch["input_ids"].shape[1], rows=self.dense)


def _hash(value: Any) -> str:
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


def _prompt(row: dict[str, Any], *, vision: bool) -> Hashable:
    """What tells a row's prompt from others: its text or tokens, and its images' content."""
    if not vision:
        return tuple(row["prompt_ids"])
    pictures = row["images"] if "images" in row else [row["image"]]
    return json.dumps(row["prompt"], default=_picture), tuple(map(_picture, pictures))


def _picture(image: Any) -> str:
    """A hash of an image's pixels; of another thing's own bytes."""
    if not isinstance(image, Image.Image):
        return _hash(image)
    if image.mode in ("P", "PA"):  # its bytes are places in a palette, not colours
        image = image.convert("RGBA")
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _span(mask: torch.Tensor, completion: torch.Tensor) -> prefix.Span:
    there = mask.nonzero()[:, 0]
    begin, end = there[0].item(), there[-1].item() + 1
    answer = completion.nonzero()[:, 0]
    return begin, answer[0].item() if len(answer) else end, end


def _keys(batch: dict[str, torch.Tensor], prompts: Sequence[Hashable], stock: Any) -> list[str]:
    """What a sequence's log-prob depends on, hashed: its tokens, which of them are the answer's,
    its images' pixels and how they are prepared."""
    how = getattr(getattr(stock, "processor", None), "image_processor", None)
    settings = how.to_json_string() if how is not None else ""
    return [_hash((settings, ids[mask].tolist(), completion[mask].tolist(), prompt))
            for ids, mask, completion, prompt in zip(
                batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"],
                prompts, strict=True)]


def fitting(rows: Dataset, collator: PackedCollator, limit: int | None) -> list[int]:
    """The numbers of the rows whose prompt, images and longer answer are at most `limit` tokens."""
    if limit is None:
        return list(range(len(rows)))
    if not collator.vision:
        return [n for n, row in enumerate(rows) if len(row["prompt_ids"]) + max(
            len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit]
    processor = collator.stock.processor
    lengths = encoding.Lengths(Checkpoint(None, processor))
    numbers = []
    for number, row in enumerate(rows):
        images = row["images"] if "images" in row else [row["image"]]
        if is_conversational(row):
            row = apply_chat_template({
                "prompt": prepare_multimodal_messages(row["prompt"], images=images),
                **{n: prepare_multimodal_messages(row[n]) for n in ("chosen", "rejected")}},
                processor)
        if lengths(row["prompt"], [i.size for i in images],
                   [row["chosen"], row["rejected"]]) <= limit:
            numbers.append(number)
    return numbers
