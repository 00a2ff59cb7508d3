"""CSV as people save it, entry by entry; a quote that is not closed costs its own line only."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from typing import TextIO

from bpo.data.layouts import IMAGE_FIELDS, Broken

DELIMITERS = ",;\t|"
_PICTURE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_CELL = 2**24  # characters: the longest cell; csv's own bound is 131072


def entries(stream: TextIO) -> Iterator[dict[str, str] | Broken]:
    """The records below the header, by its names in lower case."""
    before = csv.field_size_limit(_CELL)
    try:
        header = stream.readline()
        if said := re.match(r"sep=(.)\s*$", header):  # Excel's word for the delimiter
            header = stream.readline()
        delimiter = said[1] if said else max(DELIMITERS, key=header.count)
        names = [n.strip().lower() for n in next(csv.reader([header], delimiter=delimiter))]
        for cells in _records(stream, delimiter, names):
            if isinstance(cells, list) and len(cells) != len(names):
                cells = Broken("more or fewer cells than the header")
            yield cells if isinstance(cells, Broken) else dict(zip(names, cells, strict=True))
    finally:
        csv.field_size_limit(before)


def _records(stream: TextIO, delimiter: str, names: list[str]) -> Iterator[list[str] | Broken]:
    """The cells of each record. Of a quote that is not closed, or is closed by that of another row,
    only the line is lost: the lines that it swallowed are read again."""
    again: deque[str] = deque()
    image = next((n for n, name in enumerate(names) if name in IMAGE_FIELDS), None)

    def is_row(line: str) -> bool:
        cells = line.split(delimiter)
        return (image is not None and len(cells) >= len(names) > 1
                and bool(_PICTURE.search(cells[image].strip(' "\r\n'))))

    def lines(taken: list[str]) -> Iterator[str]:
        while line := again.popleft() if again else stream.readline():
            taken.append(line)
            yield line

    while True:
        taken: list[str] = []
        try:
            cells = next(csv.reader(lines(taken), delimiter=delimiter, strict=True,
                                    skipinitialspace=True), None)
        except csv.Error:
            cells = Broken("a quote that is not closed")
        if cells is None:
            return
        if isinstance(cells, Broken) or any(map(is_row, taken[1:])):
            cells = Broken("a quote that is not closed")
            again.extendleft(reversed(taken[1:]))
        if cells:
            yield cells
