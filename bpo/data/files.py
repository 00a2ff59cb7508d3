"""Files of annotated answers, entry by entry: JSON lists, JSON lines, CSV, parquet, their folders.

The kind of a file is told from what is in it, not from its name. Entries are streamed, never held
together, and the bytes of images inside parquet are not read. What an entry means: `layouts`.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import pyarrow
import pyarrow.parquet

from bpo.data import images
from bpo.params import Refusal

# What `layouts` may ask of an entry: no other column of a parquet file is read.
COLUMNS = ("id", "image", "images", "image_path", "image_id", "conversations", "completions",
           "prompt", "question", "chosen", "rejected", "answer", "caption", "text")
DELIMITERS = ",;\t|"
_CELL = 2**24  # characters: the longest CSV cell; csv's own bound is 131072
_BATCH = 256  # parquet rows turned into Python objects at a time
_NUMBERS = re.compile(r"[-_.]?(of-)?\d+")  # of shards, in file names
_CONVERT = ("Datasets saved with save_to_disk hold Arrow files; write parquet with "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE) and give that file")


def read(data: Path, root: Path) -> Iterator[tuple[str, Any]]:
    """Where each entry stands ("rows.json, row 1") and the entry: a dict where it is well formed.

    root: the folder that image names start from; an image inside a parquet file gets the name
    `FILE#ROW`, FILE relative to it. Raises Refusal when the data is missing, of no known kind, or
    breaks off.
    """
    files = _files(data)
    kind = _kind(files[0])
    for file in files:
        if kind == "parquet":
            yield from _parquet(file, data, root)
        elif kind == "CSV":
            yield from _csv(file)
        elif kind == "JSON lines":
            yield from _json_lines(file)
        else:
            yield from _json(file, kind)


def columns(data: Path) -> list[str]:
    """All columns of parquet data, also those that are not read; of other data, none."""
    file = _files(data)[0]
    return pyarrow.parquet.read_schema(file).names if _kind(file) == "parquet" else []


def home(data: Path) -> Path:
    """The folder that image names start from unless the user says another."""
    return (data if data.is_dir() else data.parent).resolve()


def _files(data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise Refusal(f"{data}: there is no such data file")
    if any(data.glob("*.arrow")) or any(data.glob("*/*.arrow")):
        raise Refusal(f"{data}: {_CONVERT}")
    parquet = sorted(f for f in data.rglob("*.parquet")
                     if not any(p.startswith(".") for p in f.relative_to(data).parts))
    splits = sorted({(f.relative_to(data).parent / (_NUMBERS.sub("", f.stem) or ".")).as_posix()
                     for f in parquet})
    if len(splits) > 1:
        raise Refusal(f"{data}: holds parquet files of several parts ({', '.join(splits)}); "
                      "give a folder with one of them, or one file")
    tables = parquet or sorted(data.glob("*.csv"))
    if not parquet and len(tables) != 1:
        raise Refusal(f"{data}: a data folder must hold parquet files or exactly one CSV file, "
                      f"there are {len(tables)}; name the data file itself")
    return tables


def _kind(file: Path) -> str:
    """"parquet", "CSV", "JSON lines", or where in its JSON a file has its entries, as ijson says
    it: "item" of a list, "annotations.item" of an object."""
    with file.open("rb") as stream:
        head = stream.read(2**16)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise Refusal(f"{file}: the file is empty")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        raise Refusal(f"{file}: {_CONVERT}")
    if start.startswith(b"["):
        return "item"
    if start.startswith(b"{"):
        return "annotations.item" if _has_annotations(file) else "JSON lines"
    if b"\0" in head or not any(d.encode() in start.splitlines()[0] for d in DELIMITERS):
        raise Refusal(f"{file}: is no JSON, JSON lines, CSV or parquet file: it begins with "
                      f"{start[:20]!r}")
    return "CSV"


def _has_annotations(file: Path) -> bool:
    """Whether a JSON object keeps its entries in a list under "annotations"."""
    with file.open("rb") as stream:
        try:
            # Not one value alone: what follows the first line of JSON lines is no error.
            for prefix, event, _ in ijson.parse(_without_mark(stream), multiple_values=True):
                if (prefix, event) in (("annotations", "start_array"), ("", "end_map")):
                    return event == "start_array"
        except ijson.JSONError:
            pass
    return False


def _without_mark(stream: BinaryIO) -> BinaryIO:
    """The stream behind its UTF-8 byte order mark, which ijson takes for a fault."""
    if stream.read(3) != b"\xef\xbb\xbf":
        stream.seek(0)
    return stream


def _json(file: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    number = 0
    with file.open("rb") as stream:
        try:
            for number, entry in enumerate(ijson.items(_without_mark(stream), prefix), start=1):
                yield f"{file.name}, row {number}", entry
        except ijson.JSONError as error:
            raise Refusal(
                f"{file}: the JSON breaks off or is wrong after row {number}, before byte "
                f"{stream.tell()} ({str(error).splitlines()[0]}); get the whole file") from None


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    entry = json.loads(line.decode("utf-8-sig"))
                except ValueError:
                    entry = None
                yield f"{file.name}, row {number}", entry


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    number, before = 0, csv.field_size_limit(_CELL)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            delimiter = max(DELIMITERS, key=header.count)
            names = [n.strip().lower() for n in next(csv.reader([header], delimiter=delimiter))]
            reader = csv.reader(stream, delimiter=delimiter)
            while True:
                try:
                    cells = next(reader, None)
                except csv.Error:
                    cells = [""]  # as many as no header has
                if cells is None:
                    return
                if cells:
                    number += 1
                    well_formed = len(cells) == len(names)
                    yield (f"{file.name}, row {number}",
                           dict(zip(names, cells, strict=True)) if well_formed else None)
    except UnicodeDecodeError:
        raise Refusal(f"{file}: is not UTF-8 text after row {number}; save it as UTF-8") from None
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path, data: Path, root: Path) -> Iterator[tuple[str, Any]]:
    inside = home(data) / (file.relative_to(data) if data.is_dir() else file.name)
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            column = images.image_column(parquet.schema_arrow)
            if column and not inside.is_relative_to(root):
                raise Refusal(f"{file}: its images lie inside it, so it must lie in the image "
                              f"folder {root}; move it there or leave image_folder empty")
            number = 0
            for batch in parquet.iter_batches(_BATCH, columns=_leaves(parquet, column)):
                for entry in batch.to_pylist():
                    if column:
                        name = f"{inside.relative_to(root).as_posix()}#{number}"
                        # Without a path leaf nothing tells here whether a row has an image.
                        value = entry.get(column, True)
                        entry["image"] = ([name] * len(value) if isinstance(value, list)
                                          else name if value else None)
                    number += 1
                    yield f"{file.name}, row {number}", entry
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(f"{file}: the parquet file is cut off or damaged "
                      f"({str(error).splitlines()[0]}); get the whole file") from None


def _leaves(parquet: pyarrow.parquet.ParquetFile, image_column: str | None) -> list[str]:
    """The leaf columns to read: known names, without the bytes of the image column."""
    paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    return [path for path in paths if path.split(".")[0] in COLUMNS
            and (path.split(".")[0] != image_column or path.endswith(".path"))]
