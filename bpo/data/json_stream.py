"""JSON read from a stream value by value, so that a file of any size is never held whole.

As Python's own `json` it takes NaN, which other tools write for missing values.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_BLOCK = 2**16  # characters read at a time, more where a value is longer
_LATE = 16  # characters before the end of a block in which a fault may be that of the cut
_SPACE = re.compile(r"\s*")
_decode = json.JSONDecoder().raw_decode


class JsonStream:
    """The values of a text stream. All methods raise json.JSONDecodeError where it is no JSON; its
    `end` is the number of characters that were read.

    listed: whether the value that `members` gave last is an item of a list.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.text, self.at, self.read = stream, "", 0, 0
        self.listed = False

    def ahead(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        self.ahead()
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = (error.msg.startswith("Unterminated")
                       or error.pos > len(self.text) - _LATE)
                if cut and self._more():
                    continue
                raise self._fault(error.msg) from None
            if end == len(self.text) and self._more():
                continue  # a number may go on
            self.at = min(end, len(self.text))
            return value

    def items(self) -> Iterator[Any]:
        """The items of the list that comes next."""
        self._take("[")
        if self.ahead() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self._take(",]") == "]":
                return

    def members(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of the object that comes next; a list gives its items one by one."""
        self._take("{")
        if self.ahead() == "}":
            self.at += 1
            return
        while True:
            name = self.value()
            self._take(":")
            self.listed = self.ahead() == "["
            for value in self.items() if self.listed else (self.value(),):
                yield name, value
            if self._take(",}") == "}":
                return

    def end(self) -> None:
        """Raises where something follows."""
        if self.ahead():
            raise self._fault("Extra data")

    def _take(self, signs: str) -> str:
        sign = self.ahead()
        if not sign or sign not in signs:
            raise self._fault(f"Expecting {' or '.join(signs)}")
        self.at += 1
        return sign

    def _more(self) -> bool:
        rest = self.text[self.at:]
        block = self.stream.read(max(_BLOCK, len(rest)))
        self.text, self.at, self.read = rest + block, 0, self.read + len(block)
        return bool(block)

    def _fault(self, message: str) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, "", 0)
        error.end = self.read
        return error
