"""Batches of preference rows for the packed step: each image through the processor once, and where
every token goes when the rows are packed."""

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from bpo.models import trees
from bpo.training.packed.rows import digest, pictures

TREE_TOKENS = 8192  # of a tree: its attention grows with their square. More rows begin another


class Numbered(torch.utils.data.Dataset):
    """A data set whose rows know their number, which messages name."""

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
    tokens as often as they were asked for. Prompts are told apart by the text that the template
    made of them and by their images. Pixels stay those of the distinct prompts.

    shown: what tells the images of each row apart, set before every batch. prompts: for every text
    asked for, which distinct prompt it is; begins: the same of its images and what is before them.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self.shown: list[Hashable] = []
        self.prompts: list[int] = []
        self.begins: list[int] = []

    def __getattr__(self, name: str) -> Any:
        if name == "processor" or name.startswith("__"):  # while a copy of this is being made
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        if "images" not in kwargs:  # answers
            return self.processor(text=text, **kwargs)
        images = kwargs["images"] or [[]] * len(text)
        # TRL asks for each prompt twice: in front of the chosen and of the rejected answer.
        self.prompts = number(list(zip(text[:len(text) // 2], self.shown, strict=True))) * 2
        mark = str(getattr(self.processor, "image_token", None) or "")
        self.begins = number([(t.rpartition(mark)[0] if mark and mark in t else t, s)
                              for t, s in zip(text, self.shown * 2, strict=True)])
        first = [self.prompts.index(g) for g in range(max(self.prompts) + 1)]
        self.given = text, images, kwargs
        out = self._processed(first)
        shape = out["input_ids"].shape
        self.found = {n: v for n, v in out.items() if v.shape != shape}
        for name, values in out.items():
            if values.shape == shape:
                out[name] = values[self.prompts]
        return out

    def _processed(self, rows: Sequence[int]) -> Any:
        text, images, kwargs = self.given
        if kwargs["images"] is not None:
            kwargs = {**kwargs, "images": [images[i] for i in rows]}
        return self.processor(text=[text[i] for i in rows], **kwargs)

    def pixels(self, rows: Sequence[int]) -> dict[str, Any]:
        """Pixels, grids and sizes of the images of these rows of the last batch, in this order."""
        prompts, count = [self.prompts[i] for i in rows], max(self.prompts) + 1
        if not self.found or prompts == list(range(count)):
            return self.found
        if all(len(i) == 1 for i in self.given[1]) and all(
                len(v) == count for v in self.found.values()):
            return {n: v[prompts] for n, v in self.found.items()}
        again = self._processed(rows)  # tiles and patches: how many are whose, the processor knows
        return {n: again[n] for n in self.found}


def number(things: Sequence[Hashable]) -> list[int]:
    """0, 1, ... for each, in order of appearance; equal ones have the same."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(t, len(numbers)) for t in things]


class PackedCollator:
    """TRL's batch of preference rows, and with `packed` where its tokens go in packed rows.

    Around one of TRL's own preference collators, for images or for tokens. The batch is TRL's to
    the value (2B sequences, chosen before rejected), except that pixels come once a tree (`trees`):
    a prompt with all its answers, or with share "image" all of an image's. Also in it: "row", the
    rows' numbers, if they have any; "keys", a hash of all that an answer's log-prob depends on but
    the model, for every sequence, if asked; "examples", the rows as given, if they are not `seen`.

    window: sequences beyond it are not packed, nor is their batch. tried: the longest sequence, in
    tokens, with which packing was seen to be right, of rows without and with pictures. branched:
    whether it was with several prompts in a tree.
    """

    def __init__(self, stock: Any, share: str = "prompt"):
        self.share = share
        self.vision = isinstance(stock, DataCollatorForVisionPreference)
        # What would be cut is dropped before: see `PackedDPOTrainer`.
        self.stock, self.once = (replace(stock, max_length=None) for _ in range(2))
        if self.vision:
            self.once.processor = _OnceEach(stock.processor)
        self.packing, self.dense, self.keyed, self.damaged = True, False, False, False
        self.window: int | None = None
        self.tried: dict[bool, float] = dict.fromkeys((False, True), math.inf)
        self.branched = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.damaged and not all("damaged_images" in r for r in rows):
            raise ValueError("an objective compares an image with a damaged one: the rows want a "
                             "column damaged_images")
        pairs = [{n: v for n, v in r.items() if n not in ("row", "damaged_images", "weight")}
                 for r in rows]
        batch = self._batch(pairs)
        if "packed" in batch and not self.seen(batch, rows):
            batch["examples"] = rows
        if self.damaged:
            # Twice the chosen answer, which costs nothing: equal answers are computed once.
            batch["damaged"] = self._batch([
                {**{n: v for n, v in pair.items() if n != "image"}, "images": r["damaged_images"],
                 "rejected": pair["chosen"]} for pair, r in zip(pairs, rows, strict=True)])
        if "row" in rows[0]:
            batch["row"] = [r["row"] for r in rows]
        if any("weight" in r for r in rows):
            batch["weight"] = torch.tensor([r.get("weight", 1.0) for r in rows])
        return batch

    def seen(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
        """Whether packing was seen to be right with such a batch of the rows."""
        return longest(batch)[0] <= self.tried[pictured(rows)] and (
            self.branched or not mates(batch))

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        given = [dict(r) for r in rows]  # TRL's collators write into what they are given
        shown = ([tuple(map(_picture, pictures(r))) for r in rows]
                 if self.packing or self.keyed else [])
        if self.packing:
            if self.vision:
                self.once.processor.shown = shown
            batch = dict(self.once(given))
            if self.window is None or longest(batch)[0] <= self.window:
                batch["packed"] = self._placed(batch, rows)
                if self.vision:
                    batch |= self.once.processor.pixels(batch["packed"]["first"].tolist())
            else:
                batch = dict(self.stock([dict(r) for r in rows]))
        else:
            batch = dict(self.stock(given))
        if self.keyed:
            batch["keys"] = self._keys(batch, shown * 2)
        return batch

    def _placed(self, batch: dict[str, torch.Tensor], rows: Sequence[dict[str, Any]]
                ) -> dict[str, Any]:
        """Where the tokens go, and of every row which tree (before one is cut) and prompt it is of.
        """
        prompts = (self.once.processor.prompts if self.vision
                   else number([tuple(r["prompt_ids"]) for r in rows]) * 2)
        spans = [_span(m, c) for m, c in zip(batch["attention_mask"].bool(),
                                             batch["completion_mask"].bool(), strict=True)]
        begins = self.once.processor.begins if self.vision and self.share == "image" else prompts
        return {**trees.layout(batch["input_ids"], spans, begins, rows=self.dense,
                               limit=TREE_TOKENS),
                "rows": list(zip(begins, prompts, strict=True))[:len(rows)]}

    def _keys(self, batch: dict[str, torch.Tensor], shown: Sequence[Hashable]) -> list[str]:
        """What a sequence's log-prob depends on, hashed: its tokens, which of them are the
        answer's, its images' pixels and how they are prepared."""
        how = getattr(getattr(self.stock, "processor", None), "image_processor", None)
        settings = how.to_json_string() if how is not None else ""
        return [digest((settings, ids[mask].tolist(), completion[mask].tolist(), images))
                for ids, mask, completion, images in zip(
                    batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"],
                    shown, strict=True)]


def longest(batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Tokens of the batch's longest sequence, and the number of its pair."""
    lengths = batch["attention_mask"].sum(1)
    return int(lengths.max()), int(lengths.argmax()) % (len(lengths) // 2)


def mates(batch: dict[str, Any], number: int = 0) -> list[int]:
    """Two rows of a packed batch whose prompts differ and share a tree, of that with row `number`
    if it is one of several; empty if there are none."""
    owners = batch["packed"]["rows"]
    return next(([n, m] for n in (number, *range(len(owners))) for m in range(len(owners))
                 if owners[n][0] == owners[m][0] and owners[n] != owners[m]), [])


def pictured(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether one of the rows has a picture."""
    return any(pictures(r) for r in rows)


def _picture(image: Any) -> str:
    """A hash of an image's pixels; of another thing's own bytes."""
    if not isinstance(image, Image.Image):
        return digest(image)
    if image.mode in ("P", "PA"):  # its bytes are places in a palette, not colours
        image = image.convert("RGBA")
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _span(mask: torch.Tensor, completion: torch.Tensor) -> trees.Span:
    there = mask.nonzero()[:, 0]
    begin, end = there[0].item(), there[-1].item() + 1
    answer = completion.nonzero()[:, 0]
    return begin, answer[0].item() if len(answer) else end, end
