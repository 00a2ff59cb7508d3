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

from bpo.models import prefix

SAME = ("image", "images", "prompt", "chosen", "completion")  # what one positive's rows share


def positives(dataset: Dataset) -> list[list[int]]:
    """The rows of each positive: those that share image, prompt and chosen answer, in their order.

    Compared as they are stored: an image by its file's name and bytes, not by its pixels. Raises
    ValueError for a row whose rejected answer is the chosen one, which would train on nothing.
    Rows for SFT, which have a completion in place of both answers, are told apart by it.
    """
    groups: dict[bytes, list[int]] = {}
    names = [n for n in (*SAME, "rejected") if n in dataset.column_names]
    raw = dataset.select_columns(names).with_format("arrow")
    stored = (row for table in raw.iter(batch_size=64) for row in table.to_pylist())
    for number, row in enumerate(stored):
        if "rejected" in row and row.pop("rejected") == row["chosen"]:
            raise ValueError(f"row {number} of the data set: the rejected answer is the chosen "
                             "one, which would train on nothing; remove the row")
        key = hashlib.sha256(pickle.dumps(list(row.items()))).digest()
        groups.setdefault(key, []).append(number)
    return list(groups.values())


class PositiveSampler(Sampler[int]):
    """Rows in random order, except that those of one positive follow each other within a batch.

    The positives are shuffled. One that does not fit into what is left of a batch waits for the
    next; only one larger than a batch, and what is left over at the end, is spread over several.
    """

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
            line = next((w for w in waiting if len(w) <= room), None)
            if line is not None:
                waiting.remove(line)
            elif order:
                line = order.popleft()
                if len(line) > room and room < self.batch:
                    waiting.append(line)
                    continue
            else:
                line = waiting.popleft()
            yield from line
            room = (room - len(line) - 1) % self.batch + 1


def sampler(groups: Sequence[Sequence[int]], args: TrainingArguments, *, batch: int
            ) -> PositiveSampler | None:
    """The order of training rows that keeps positives together; None where the trainer's own does:
    all stand alone, or the order is not to be random."""
    if args.train_sampling_strategy != "random" or all(len(g) == 1 for g in groups):
        return None
    seed = args.data_seed if args.data_seed is not None else args.seed
    return PositiveSampler(groups, batch=batch, seed=seed)


class Numbered(torch.utils.data.Dataset):
    """A data set whose rows know their number, for messages and to be read once more."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], "row": number}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        return [{**row, "row": n} for row, n in zip(self.rows.__getitems__(numbers), numbers,
                                                    strict=True)]


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

    def __init__(self, plain: Any):
        self.plain = plain
        self.vision = isinstance(plain, DataCollatorForVisionPreference)
        # What would be cut is dropped before: see `PackedDPOTrainer`.
        self.inner, self.unpacked = (replace(plain, max_length=None) for _ in range(2))
        if self.vision:
            self.inner.processor = _OnceEach(plain.processor)
        self.packing, self.dense, self.keyed, self.damaged = True, False, False, False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [dict(r) for r in rows]  # TRL's collators write into what they are given
        numbers = [r.pop("row") for r in rows if "row" in r]
        damaged = [r.pop("damaged_images") for r in rows if "damaged_images" in r]
        if self.damaged:
            if len(damaged) < len(rows):
                raise ValueError("an objective compares an image with a damaged one: the rows "
                                 "want a column damaged_images")
            again = [{**r, "images": d, "rejected": r["chosen"]}
                     for r, d in zip(rows, damaged, strict=True)]
        batch = self._batch(rows)
        if self.damaged:
            # Twice the chosen answer, which costs nothing: equal answers are computed once.
            batch["damaged"] = self._batch([{n: v for n, v in r.items() if n != "image"}
                                            for r in again])
        if numbers:
            batch["row"] = numbers
        return batch

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        prompts = [_prompt(r, vision=self.vision) for r in rows]
        if self.packing:
            known: dict[Hashable, int] = {}
            groups = [known.setdefault(p, len(known)) for p in prompts]
            if self.vision:
                self.inner.processor.rows = groups * 2
            batch = dict(self.inner(rows))
            batch["packed"] = self._placed(batch, groups)
        else:
            batch = dict(self.unpacked(rows))
        if self.keyed:
            batch["keys"] = _keys(batch, prompts * 2, self.plain)
        return batch

    def _placed(self, batch: dict[str, torch.Tensor], groups: Sequence[int]) -> dict[str, Any]:
        """Where the tokens go; every answer is a branch of its prompt, equal ones the same."""
        spans = [_span(m, c) for m, c in zip(batch["attention_mask"].bool(),
                                             batch["completion_mask"].bool(), strict=True)]
        answers = [tuple(ids[begin:end].tolist()) for ids, (_, begin, end)
                   in zip(batch["input_ids"], spans, strict=True)]
        return prefix.layout(spans, list(zip(groups * 2, answers, strict=True)),
                             width=batch["input_ids"].shape[1], rows=self.dense)


def _prompt(row: dict[str, Any], *, vision: bool) -> Hashable:
    """What a row's prompt is known by: its text or tokens, and its images' content."""
    if not vision:
        return tuple(row["prompt_ids"])
    pictures = row["images"] if "images" in row else [row["image"]]
    return (json.dumps(row["prompt"], default=_picture),
            tuple(_picture(p) for p in pictures))


def _picture(image: Any) -> str:
    """A hash of an image's pixels; of another thing's own bytes."""
    if isinstance(image, Image.Image):
        if image.mode in ("P", "PA"):  # its bytes are places in a palette, not colours
            image = image.convert("RGBA")
        known = f"{image.mode} {image.size} ".encode() + image.tobytes()
    else:
        known = pickle.dumps(image)
    return hashlib.sha256(known).hexdigest()


def _span(mask: torch.Tensor, completion: torch.Tensor) -> prefix.Span:
    there = mask.nonzero()[:, 0]
    begin, end = there[0].item(), there[-1].item() + 1
    answer = completion.nonzero()[:, 0]
    return begin, answer[0].item() if len(answer) else end, end


def _keys(batch: dict[str, torch.Tensor], prompts: Sequence[Hashable], plain: Any) -> list[str]:
    """What a sequence's log-prob depends on, hashed: its tokens, which of them are the answer's,
    its images' pixels and how they are prepared."""
    how = getattr(getattr(plain, "processor", None), "image_processor", None)
    common = how.to_json_string() if how is not None else ""
    keys = []
    for ids, mask, completion, prompt in zip(batch["input_ids"], batch["attention_mask"].bool(),
                                             batch["completion_mask"], prompts, strict=True):
        known = (common, ids[mask].tolist(), completion[mask].tolist(), prompt)
        keys.append(hashlib.sha256(pickle.dumps(known)).hexdigest())
    return keys


def fitting(rows: Dataset, collator: PackedCollator, limit: int | None) -> list[int]:
    """The numbers of the rows whose prompt, images and longer answer are at most `limit` tokens."""
    if limit is None:
        return list(range(len(rows)))
    tokens = _VisionLengths(collator.plain.processor) if collator.vision else lambda row: len(
        row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    return [n for n, row in enumerate(rows) if tokens(row) <= limit]


class _VisionLengths:
    """The length of a row in tokens. What images add depends on their sizes alone, so the processor
    sees one row of each set of sizes."""

    def __init__(self, processor: Any):
        self.processor, self.added = processor, {}

    def __call__(self, row: dict[str, Any]) -> int:
        images = row["images"] if "images" in row else [row["image"]]
        if is_conversational(row):
            row = {"prompt": prepare_multimodal_messages(row["prompt"], images=images),
                   **{n: prepare_multimodal_messages(row[n]) for n in ("chosen", "rejected")}}
            row = apply_chat_template(row, self.processor)
        prompt, *answers = (len(self.processor.tokenizer(row[n], add_special_tokens=False)
                                ["input_ids"]) for n in ("prompt", "chosen", "rejected"))
        sizes = tuple(i.size for i in images)
        if images and sizes not in self.added:
            whole = self.processor(images=[images], text=[row["prompt"]], add_special_tokens=False)
            self.added[sizes] = len(whole["input_ids"][0]) - prompt
        return prompt + self.added.get(sizes, 0) + max(answers)
