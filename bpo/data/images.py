"""Images that users hold: opened as RGB, or the reason why one cannot be used.

Rules of conversion: EXIF orientation is applied; of an animation the first frame is taken; palettes
are resolved; what is transparent lies on white; CMYK and grey become RGB; 16-bit grey is scaled to
8 bits. An image is a file, or row N of a parquet file's image column, written `train.parquet#N`
with rows counted from 0. Of layouts this module knows the names of image columns alone.
"""

import io
import itertools
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from bpo.data.layouts import IMAGE_FIELDS
from bpo.params import Refusal
from bpo.study import hub
from bpo.study.files import LineFile

MAX_PIXELS = 89_478_485  # 256 MB as RGB: where Pillow begins to warn of decompression bombs
MAX_ASPECT = 200  # a processor makes the short side as long as the model's: the other grows with it
# What data sets come in. Others Pillow would hand to outside programs (EPS) or decode from text.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_THREADS = min(8, os.cpu_count() or 1)
_IN_PARQUET = re.compile(r"(.+\.parquet)#(\d+)", re.DOTALL)
_reading = threading.Lock()  # a ParquetFile is not made for several threads


class Unusable(Refusal):
    """An image that cannot be used; its arguments are the file and why, in a few stable words."""

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


def load(file: Path) -> Image.Image:
    """The image as RGB by the module's rules; raises Unusable."""
    with _opened(file) as image:
        image.load()  # first: behind it a fault is one of the EXIF block
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # the pixels are whole; a damaged EXIF block says nothing about them
            pass
        if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255
            image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def size(file: Path) -> tuple[int, int]:
    """(width, height) of what `load` returns, from the image's header: no pixel is decoded.

    Raises Unusable as `load` does, but does not see that the pixels behind the header are damaged.
    """
    with _opened(file) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image once it is turned as its EXIF block says."""
    # Pillow decodes a PNG whole to look for orientation behind its pixels, where no camera
    # writes it.
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
    turned = exif.get(ExifTags.Base.Orientation, 1) in SIDEWAYS
    return image.size[::-1] if turned else image.size


def problem(file: Path) -> str | None:
    """Why an image cannot be used, in a few stable words, or None. Decodes all of it: a header does
    not show that the rest was cut off."""
    try:
        load(file)
    except Unusable as error:
        return error.args[1]
    return None


def problems(files: Iterable[Path]) -> Iterator[str | None]:
    """The problem of each file in order.

    Threads decode (Pillow lets go of the interpreter), a few files together; one that comes several
    times among these is decoded once.
    """
    files = iter(files)
    # Warnings of odd metadata would drown what matters. Filters belong to the whole process.
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        while batch := list(itertools.islice(files, 8 * _THREADS)):
            distinct = list(dict.fromkeys(batch))
            found = dict(zip(distinct, pool.map(problem, distinct), strict=True))
            yield from (found[file] for file in batch)


def place(root: Path, name: str) -> Path | None:
    """root / name, or None where an absolute name, `..` or a link leads out of `root`, which must
    be resolved. Says nothing about whether the image is there.

    A parquet file may itself be a link, as in the hub's cache: it is data the user named.
    """
    file = root / name
    try:
        real = os.path.normpath(file) if _IN_PARQUET.fullmatch(name) else file.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with a null byte
        return file
    inside = not Path(name).is_absolute() and any(
        Path(real).is_relative_to(r) for r in (root, hub.contents(root)))
    return file if inside else None


def named(lists: Mapping[Path, Path]) -> dict[str, Path]:
    """The files of all images that files of lines name under "image", by name. lists: file of lines
    -> the folder that its names start from. Those inside a parquet file are that file."""
    found = {}
    for lines, root in lists.items():
        for line in LineFile(lines):
            inside = _IN_PARQUET.fullmatch(line["image"])
            name = inside[1] if inside else line["image"]
            found[f"{name} of {lines.name}"] = root / name
    return found


def exists(file: Path) -> bool:
    """Whether the image's file is there; of one inside parquet, the parquet file."""
    inside = _IN_PARQUET.fullmatch(str(file))
    return os.path.isfile(inside[1] if inside else file)


def source(file: Path) -> Path | BinaryIO:
    """Where an image's bytes are: its file, or what lies in its parquet row; where that holds a
    path alone, the file of that name beside the parquet file. Raises Unusable where there are none.
    """
    inside = _IN_PARQUET.fullmatch(str(file))
    if not exists(file):
        raise Unusable(file, "image file is missing")
    if inside:
        data = _bytes(Path(inside[1]), int(inside[2]))
        if isinstance(data, str):
            folder = Path(inside[1]).parent
            beside = place(folder.resolve(), data)
            if beside is None or not exists(beside):
                raise Unusable(folder / data, "image file is missing")
            return source(beside)
        if data is None:
            raise Unusable(file, "image file is missing")
    if not (data if inside else os.stat(file).st_size):
        raise Unusable(file, "image file is empty")
    return io.BytesIO(data) if inside else file


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """The image with its header read; what goes wrong inside the block becomes Unusable."""
    try:
        with Image.open(source(file), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Unusable(file, "image is too large")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise Unusable(file, "image is too narrow")
            yield image
    except Unusable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unusable(file, "image is too large") from None
    except UnidentifiedImageError:
        raise Unusable(file, "image format is not known") from None
    except Exception:  # decoders of damaged data raise nearly anything
        raise Unusable(file, "image is cut off or damaged") from None


def image_column(schema: pyarrow.Schema) -> str | None:
    """The column of a parquet file that holds images, not their names: {bytes, path} under any
    name, bytes under a usual one, or a list of them."""
    usual = [n for n in IMAGE_FIELDS if n in schema.names]
    for name in dict.fromkeys((*usual, *schema.names)):
        kind = schema.field(name).type
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            kind = kind.value_type
        if pyarrow.types.is_struct(kind):
            if kind.get_field_index("bytes") >= 0 and not re.search("audio|video", name):
                return name
        elif name in usual and (pyarrow.types.is_binary(kind)
                                or pyarrow.types.is_large_binary(kind)):
            return name
    return None


def _bytes(file: Path, row: int) -> bytes | None | str:
    """The image bytes of a row, or its path where only that was stored; None where there is
    neither. Reads its row group and keeps it."""
    state = file.stat()
    with _reading:
        parquet, column, starts = _parquet(file, state.st_mtime_ns, state.st_size)
        if column is None or row >= starts[-1]:
            return None
        group = int(np.searchsorted(starts, row, side="right")) - 1
        value = _row_group(parquet, column, group)[row - int(starts[group])].as_py()
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None and value.get("path") else value["bytes"]
    return value if isinstance(value, (bytes, str)) else None


@lru_cache(maxsize=8)
def _parquet(file: Path, *state: int) -> tuple[pyarrow.parquet.ParquetFile, str | None, np.ndarray]:
    """An open file, its image column, and the first row of each row group, with the end."""
    parquet = pyarrow.parquet.ParquetFile(file)
    rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    return parquet, image_column(parquet.schema_arrow), np.cumsum([0, *rows])


@lru_cache(maxsize=2)
def _row_group(parquet: pyarrow.parquet.ParquetFile, column: str, group: int
               ) -> pyarrow.ChunkedArray:
    return parquet.read_row_group(group, columns=[column]).column(column)
