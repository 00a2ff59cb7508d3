"""What a model is given: prompts and answers as its chat template writes them, images as its
processor prepares them, noised or not, and batches of both.

Nothing here knows a model family, runs a model or reads a file.
"""

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image, ImageOps
from transformers import AddedToken

from bpo.models.checkpoint import Checkpoint, load_processor
from bpo.models.noise import add_noise
from bpo.params import Refusal

Messages = Sequence[Mapping[str, str]]

# The one index among processors' tensors: the patches that make an image token, by their number in
# all of `pixel_values`, or -1 (Molmo2's).
PATCHES = "image_token_pooling"


def special(*processors: Any) -> re.Pattern:
    """The tokens that tokenizers take for themselves wherever they stand in a text: ends, places of
    images, turns."""
    names = set()
    for processor in processors:
        tokenizer = getattr(processor, "tokenizer", processor)
        names.update(tokenizer.all_special_tokens)
        names.update(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        names.update(str(v) for n, v in vars(processor).items()
                     if n.endswith("_token") and isinstance(v, (str, AddedToken)))
    return re.compile("|".join(map(re.escape, sorted(filter(str.strip, names), key=len,
                                                     reverse=True))))


@functools.cache
def special_in(folder: Path) -> re.Pattern:
    """`special` of the checkpoint in a folder, whose processor is loaded once."""
    return special(load_processor(folder))


def prompt_text(checkpoint: Checkpoint, messages: Messages, *, image: bool) -> str:
    """The prompt in front of an answer, as the chat template writes it; raises Refusal where it
    takes no such turns (some know no system)."""
    try:
        return checkpoint.processor.apply_chat_template(
            _turns(checkpoint, messages, image=image), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise Refusal(f"the checkpoint's chat template takes no turns of {roles} ({error}): leave "
                      "such rows out, or take another checkpoint") from None


def answer_text(checkpoint: Checkpoint, messages: Messages, answer: str) -> str:
    """What follows a prompt with an image when the answer is given: the template's words plus the
    end token.

    Some templates (LLaVA-1.5's in its public layout) leave the end token out; a model trained
    without it would not learn where to stop, so it is always there.
    """
    turns = _turns(checkpoint, [*messages, {"role": "assistant", "content": answer}], image=True)
    whole = checkpoint.processor.apply_chat_template(turns, tokenize=False)
    prompt = prompt_text(checkpoint, messages, image=True)
    if not whole.startswith(prompt):
        raise Refusal("the chat template writes another prompt once an answer follows it: "
                      "answers cannot be told from prompts with this checkpoint")
    end = checkpoint.tokenizer.eos_token
    rest = whole[len(prompt):].rstrip()
    return rest if rest.endswith(end) else rest + end


def _turns(checkpoint: Checkpoint, messages: Messages, *, image: bool) -> list[dict[str, Any]]:
    """Messages as the chat template takes them: strings for a tokenizer's, typed parts for a
    processor's. An image stands in front of the first user turn's text."""
    if not image and checkpoint.processor is checkpoint.tokenizer:
        return [dict(m) for m in messages]
    turns = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
             for m in messages]
    if image:
        first = next(t for t in turns if t["role"] == "user")
        first["content"].insert(0, {"type": "image"})
    return turns


def encode(checkpoint: Checkpoint, text: str, image: Image.Image | None) -> dict[str, torch.Tensor]:
    """One prompt through the processor: input_ids (1, S), attention_mask (1, S), pixel values, ...

    The template wrote the special tokens already, so none are added.
    """
    return _processed(checkpoint, [text], [image])


def encode_all(checkpoint: Checkpoint, texts: Sequence[str],
               images: Sequence[Image.Image | None]) -> list[dict[str, torch.Tensor]]:
    """`encode` of each prompt, to the byte; in one call where images are fixed in size, which
    spares most of the processor's time."""
    rows = [encode(checkpoint, t, i) for t, i in zip(texts[:1], images[:1], strict=True)]
    texts, images = texts[1:], images[1:]
    if not texts or not _stacks(rows[0]) or len({i is None for i in images}) > 1:
        return rows + [encode(checkpoint, t, i) for t, i in zip(texts, images, strict=True)]
    batch = _processed(checkpoint, texts, images)
    return rows + [{name: v[n:n + 1] if name == "pixel_values" else v[n:n + 1, seen]
                    for name, v in batch.items()}
                   for n, seen in enumerate(batch["attention_mask"].bool())]


def reader(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a processor of its own, to encode in a thread while others use the first:
    a tokenizer cannot be set to padding while it decodes."""
    return replace(checkpoint, processor=copy.deepcopy(checkpoint.processor))


def _stacks(row: Mapping[str, torch.Tensor]) -> bool:
    """Whether rows like this one can be processed together: an image is one array of its own, and
    all else has a value a token. Tiles, patches and sizes (other families) are neither."""
    return all(v.ndim == 4 and len(v) == 1 if n == "pixel_values"
               else v.shape == row["input_ids"].shape for n, v in row.items())


def _processed(checkpoint: Checkpoint, texts: Sequence[str],
               images: Sequence[Image.Image | None]) -> dict[str, torch.Tensor]:
    # Images come in a list a prompt: Gemma 3 takes a flat list for the images of one prompt.
    given = {} if images[0] is None else {
        "images": [[transformed(i, checkpoint.transform, checkpoint.processor)] for i in images]}
    return dict(checkpoint.processor(text=list(texts), add_special_tokens=False, padding=True,
                                     padding_side="left", return_tensors="pt", **given))


def transformed(image: Image.Image, transform: str, processor: Any) -> Image.Image:
    """An RGB image as it is handed to the processor.

    transform: "processor" leaves it to the processor; "pad" makes it square with bars of the
    processor's mean colour, as LLaVA-1.5 was trained; "crop" cuts out the middle square.
    """
    width, height = image.size
    if transform == "processor" or width == height:
        return image
    if transform == "crop":
        return ImageOps.fit(image, (min(image.size),) * 2)
    side = max(image.size)
    square = Image.new("RGB", (side, side), mean_colour(processor))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_colour(processor: Any) -> tuple[int, int, int]:
    """The colour that the processor normalises to zero."""
    return tuple(round(255 * m) for m in processor.image_processor.image_mean)


def noised(processor: Any, pixels: torch.Tensor, step: int,
           generator: torch.Generator) -> torch.Tensor:
    """The processor's pixels of one image at a noise step.

    Where a still image fills several frames (Qwen2-VL's kin lay each patch down
    `temporal_patch_size` times, and the model adds them up), all frames get the same noise:
    independent draws would average out and weaken it.
    """
    copies = getattr(processor.image_processor, "temporal_patch_size", 1)
    if copies == 1 or pixels.ndim != 2:
        return add_noise(pixels, step, generator)
    frames = pixels.unflatten(1, (3, copies, -1))  # (patches, colours, frames, pixels)
    return add_noise(frames[:, :, :1], step, generator).expand_as(frames).flatten(1)


def noised_picture(processor: Any, image: Image.Image, step: int,
                   generator: torch.Generator) -> Image.Image:
    """What the model is shown at a noise step, as a picture."""
    return weakened_picture(processor, image, lambda pixels: add_noise(pixels, step, generator))


def weakened_picture(processor: Any, image: Image.Image,
                     weaken: Callable[[torch.Tensor], torch.Tensor]) -> Image.Image:
    """The processor's pixels, weakened and put back into colours. A processor that cuts the image
    up (tiles, patches) has no single picture; then the image itself is weakened, normalised alike.
    """
    how = processor.image_processor
    mean, std = (torch.tensor(getattr(how, f"image_{n}"))[:, None, None] for n in ("mean", "std"))
    pixels = how(images=image, return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        flat = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
        pixels = ((flat - mean) / std)[None]
    colours = weaken(pixels)[0] * std + mean
    levels = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def answer_tokens(checkpoint: Checkpoint, messages: Messages, answer: str) -> list[int]:
    """The token ids of an answer to a question about an image, with its end."""
    return answer_ids(checkpoint, answer_text(checkpoint, messages, answer))


def answer_ids(checkpoint: Checkpoint, text: str) -> list[int]:
    return checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]


class Lengths:
    """Tokens of a prompt with its images and of the longest answer to it. What images add depends
    on their sizes alone, so the processor sees one blank image of each (`added`)."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.added = checkpoint, {}

    def __call__(self, prompt: str, sizes: Sequence[tuple[int, int]], answers: Sequence[str]
                 ) -> int:
        """Texts as the chat template writes them; sizes: width and height of each image."""
        processor, sizes = self.checkpoint.processor, tuple(sizes)
        count, *others = (len(answer_ids(self.checkpoint, t)) for t in (prompt, *answers))
        if sizes and sizes not in self.added:
            blank = [transformed(Image.new("RGB", s), self.checkpoint.transform, processor)
                     for s in sizes]
            whole = processor(text=[prompt], images=[blank], add_special_tokens=False,
                              return_tensors="pt")
            self.added[sizes] = whole["input_ids"].shape[1] - count
        return count + self.added.get(sizes, 0) + max(others)


def collate(checkpoint: Checkpoint, rows: Sequence[Mapping[str, torch.Tensor]]
            ) -> dict[str, torch.Tensor]:
    """Encoded prompts as one batch on the model's device, padded on the left to one length.

    Everything that has the prompt's length is padded; the rest (pixels, grids) is put end to end,
    where images differ in tiles, height or width behind zeros up to the largest, as processors fill
    a batch up: sizes or masks beside them say what is image.
    """
    ids = rows[0]["input_ids"]
    batch = {}
    for key, first in rows[0].items():
        parts = [r[key] for r in rows]
        if first.shape == ids.shape:
            fill = checkpoint.tokenizer.pad_token_id if key == "input_ids" else 0
            width = max(x.shape[1] for x in parts)
            parts = [torch.nn.functional.pad(x, (width - x.shape[1], 0), value=fill) for x in parts]
        elif len({x.shape[1:] for x in parts}) > 1:
            largest = [max(sides) for sides in zip(*(x.shape[1:] for x in parts), strict=True)]
            parts = [_filled(x, largest) for x in parts]
        elif key == PATCHES:
            before = np.cumsum([0, *(r["pixel_values"].shape[:2].numel() for r in rows[:-1])])
            parts = [torch.where(x < 0, x, x + int(n)) for x, n in zip(parts, before, strict=True)]
        dtype = checkpoint.base.dtype if key == "pixel_values" else None
        batch[key] = torch.cat(parts).to(checkpoint.device, dtype)
    return batch


def _filled(images: torch.Tensor, largest: Sequence[int]) -> torch.Tensor:
    out = images.new_zeros(len(images), *largest)
    out[tuple(map(slice, images.shape))] = images
    return out
