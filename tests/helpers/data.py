"""Pictures of coloured things, and conversations about them."""

import random
import struct
import zlib

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230),
           "yellow": (230, 220, 40)}
THINGS = ("disc", "box", "cat", "dog")


def picture(thing: str, colour: str, seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A thing (a disc or a box stands for it) in its colour on RGB noise."""
    rng = random.Random(seed)
    image = Image.frombytes("RGB", size, bytes(rng.randrange(256) for _ in range(3 * size[0]
                                                                                 * size[1])))
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if thing in ("disc", "cat") else draw.rectangle
    shape((6, 6, size[0] - 8, size[1] - 8), fill=COLOURS[colour])
    return image


def said(role: str, text: str | None) -> list[dict]:
    """A text as the one message that a preference row holds."""
    return [{"role": role, "content": text}]


def row(image: Image.Image, chosen: str = "red", rejected: str = "blue",
        question: str = "what colour is the disc ?") -> dict:
    """A preference row about an image."""
    return {"images": [image], "prompt": said("user", question),
            "chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}


def conversation(row_id: str, image: str, question: str, answer: str) -> dict:
    return {"id": row_id, "image": image, "conversations": [
        {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]}


def png_header(width, height):
    """A PNG that says how large it is, and holds nothing."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))
    sizes = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b""))
