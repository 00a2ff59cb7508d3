"""Files of annotated answers, entry by entry: JSON, JSON lines, CSV, parquet, their folders.

The kind of a file is told from what is in it, not from its name; gzip is unpacked on the way.
Entries are streamed, never held together, and the bytes of images inside parquet are not read.
What an entry means: `layouts`.
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow
import pyarrow.parquet

from bpo.data import csv_table, images
from bpo.data.json_stream import JsonStream
from bpo.data.layouts import FIELDS, Broken
from bpo.params import Refusal

_HEAD = 2**16  # bytes that tell a file's kind
_BLANK = object()  # a line that counts as a row and holds none
_BATCH = 256  # parquet rows turned into Python objects at a time
_NUMBERS = re.compile(r"[-_.]?(of-)?\d+")  # of shards, in file names
_CONVERT = ("Datasets saved with save_to_disk hold Arrow files; write parquet with "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE) and give that file")
_FOREIGN = {  # what a file begins with that others take for data -> what to do
    b"ARROW1": _CONVERT, b"\xff\xff\xff\xff": _CONVERT,
    b"PK\x03\x04": "is a zip or Excel file; unpack it, or save the table as CSV (UTF-8)",
    b"version https://git-lfs": "is a pointer of Git LFS; get the file itself with git lfs pull",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it",
    b"BZh": "is packed with bzip2; unpack it"}


def read(data: Path, root: Path) -> Iterator[tuple[str, Any]]:
    """Where each entry stands ("rows.json, row 1") and the entry: a dict where it is well formed,
    Broken where its text cannot be read.

    root: the folder that image names start from; an image inside a parquet file gets the name
    `FILE#ROW`, FILE relative to it. Raises Refusal when the data is missing, of no known kind, in
    another encoding, or breaks off.
    """
    for file in _files(data):
        number = 0
        try:
            kind = _kind(file)
            entries = (_parquet(file, data, root) if kind == "parquet" else
                       {"CSV": _csv, "JSON lines": _json_lines, "JSON": _json}[kind](file))
            for number, entry in enumerate(entries, start=1):
                if entry is not _BLANK:
                    yield f"{file.name}, row {number}", entry
        except json.JSONDecodeError as error:
            raise Refusal(f"{file}: the JSON breaks off or is wrong after row {number}, before "
                          f"byte {error.end} ({error.msg}); get the whole file") from None
        except RecursionError:
            raise Refusal(f"{file}: the JSON after row {number} is nested too deeply; get the "
                          "file again") from None
        except UnicodeError as error:
            bad = getattr(error, "object", b"?")[getattr(error, "start", 0):][:1].hex()
            raise Refusal(f"{file}: is not UTF-8 text after row {number} (byte 0x{bad}), perhaps "
                          "Latin-1 (Windows-1252); save it as UTF-8: iconv -f WINDOWS-1252 -t "
                          f"UTF-8 {file.name}") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Refusal(f"{file}: the gzip file is cut off or damaged after row {number} "
                          f"({error}); get the whole file") from None


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
    tables = parquet or sorted(data.glob("metadata.*")) or sorted(data.glob("*.csv"))
    if not parquet and len(tables) != 1:
        raise Refusal(f"{data}: a data folder must hold parquet files, a metadata.jsonl beside its "
                      f"pictures, or exactly one CSV file, there are {len(tables)}; name the data "
                      "file itself")
    return tables


def _open(file: Path) -> BinaryIO:
    with file.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(file) if packed else file.open("rb")


def _text(file: Path, *, newline: str = "", errors: str = "strict") -> TextIO:
    """A file's text: UTF-8, or UTF-16 with its byte order mark."""
    stream = _open(file)
    wide = stream.read(2) in (b"\xff\xfe", b"\xfe\xff")
    stream.seek(0)
    return io.TextIOWrapper(stream, "utf-16" if wide else "utf-8-sig", errors, newline)


def _kind(file: Path) -> str:
    """"parquet", "CSV", "JSON lines" or "JSON"."""
    with _open(file) as stream:
        start = stream.read(_HEAD)
    if start.startswith(b"PAR1"):
        return "parquet"
    if remedy := next((r for magic, r in _FOREIGN.items() if start.startswith(magic)), ""):
        raise Refusal(f"{file}: {remedy}")
    if start[257:262] == b"ustar":
        raise Refusal(f"{file}: is a tar file; unpack it, or write a webdataset as parquet: "
                      "datasets.load_dataset('webdataset', data_files=FILE, split='train')"
                      ".to_parquet('train.parquet')")
    with _text(file, errors="replace") as stream:
        head = stream.read(_HEAD).lstrip()
    if not head:
        raise Refusal(f"{file}: the file is empty")
    if head[0] == "[":
        return "JSON"
    if head[0] == "{":
        return "JSON lines" if _in_lines(file, head) else "JSON"
    if "\0" in head or not any(d in head.splitlines()[0] for d in csv_table.DELIMITERS):
        raise Refusal(f"{file}: is no JSON, JSON lines, CSV or parquet file: it begins with "
                      f"{start[:20]!r}")
    return "CSV"


def _in_lines(file: Path, head: str) -> bool:
    """Whether a file that begins with an object has one on each line; `head` may end within one."""
    first, _, rest = head.partition("\n")
    if rest.strip():
        try:
            json.loads(first)
            return True
        except ValueError:
            return rest.lstrip().startswith("{")
    with _text(file, errors="replace") as stream, suppress(json.JSONDecodeError):
        value = JsonStream(stream)
        for _ in value.members():
            pass
        return bool(value.ahead())
    return False


def _json(file: Path) -> Iterator[Any]:
    """The items of a list; of an object those of the list in it, or its members; objects one behind
    the other."""
    with _text(file) as stream:
        values = JsonStream(stream)
        if values.ahead() == "[":
            yield from values.items()
            values.end()
            return
        part, names = _part(file)
        if part is None:
            while values.ahead():
                yield values.value()
            return
        for key, value in values.members():
            if part == "*":
                yield {"id": key, **value} if isinstance(value, dict) else value
            elif key == part:
                if isinstance(value, dict) and value.get("image_id") in names:
                    value = {"image": names[value["image_id"]], **value}
                yield value


def _part(file: Path) -> tuple[str | None, dict[Any, str]]:
    """Where a JSON object has its entries: a list under this name, "*" for its members, None where
    it is one itself; and the names of images by number that COCO keeps in a list of their own."""
    lists, names, alone, members = Counter(), {}, set(), 0
    with _text(file, errors="replace") as stream, suppress(json.JSONDecodeError):
        values = JsonStream(stream)
        for key, value in values.members():
            if not isinstance(value, dict):
                alone.add(key)
            elif not values.listed:
                members += 1
            else:
                lists[key] += 1
                if key == "images" and {"id", "file_name"} <= value.keys():
                    names[value["id"]] = value["file_name"]
        if values.ahead():
            return None, {}
    several = [n for n in lists if n != "images"]
    if "annotations" in lists:
        return "annotations", names
    if alone & FIELDS or lists.keys() & FIELDS - {"images"}:  # the file is one entry
        return None, {}
    if len(several) > 1:
        raise Refusal(f"{file}: holds several lists ({', '.join(several)}); write the one to be "
                      "read into a file of its own")
    if lists:
        return [*several, "images"][0], names
    return ("*" if members and not alone else None), {}


def _json_lines(file: Path) -> Iterator[Any]:
    with _text(file, newline="\n", errors="surrogateescape") as stream:
        line, following = "", stream.readline()
        end = 0
        while following:
            line, following = following, stream.readline()
            end += len(line)
            if not line.strip():
                yield _BLANK
                continue
            try:
                line.encode()
                yield json.loads(line)
            except UnicodeEncodeError:
                yield Broken("not UTF-8 text: save the file as UTF-8")
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(line.rstrip())
                if not following and (cut or not line.endswith("\n")):
                    error.end = end
                    raise
                yield Broken("not a row")
            except RecursionError:
                yield Broken("not a row")


def _csv(file: Path) -> Iterator[Any]:
    with _text(file) as stream:
        yield from csv_table.entries(stream)


def _parquet(file: Path, data: Path, root: Path) -> Iterator[Any]:
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
                    yield entry
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(f"{file}: the parquet file is cut off or damaged "
                      f"({str(error).splitlines()[0]}); get the whole file") from None


def _leaves(parquet: pyarrow.parquet.ParquetFile, image_column: str | None) -> list[str]:
    """The leaf columns to read: known names, without the bytes of images and videos."""
    paths = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
    return [path for path in paths
            if path.split(".")[0].strip().lower() in FIELDS | {image_column}
            and not path.endswith(".bytes")
            and (path.split(".")[0] != image_column or path.endswith(".path"))]
