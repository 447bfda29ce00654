"""Reading a JSON object whose lists are too long for memory: its top-level values one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK = 2**20
_MAX_ELEMENT = 64 * 2**20


class _Reader:
    """A window on a text that moves on as values are taken from its front."""

    def __init__(self, text: TextIO) -> None:
        self._text, self._window, self._is_over = text, "", False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Return the next character that is not blank; empty at the end."""
        while True:
            self._window = self._window.lstrip()
            if self._window or self._is_over:
                return self._window[:1]
            self._grow()

    def expect(self, characters: str) -> str:
        """Take one of several characters."""
        found = self.peek()
        if not found or found not in characters:
            raise ValueError(f"'{found or 'its end'}' stands where one of {' '.join(characters)} should")
        self._window = self._window[1:]
        return found

    def expect_end(self) -> None:
        """Read to the end of the text, where nothing more may come."""
        rest = self.peek()
        if rest:
            raise ValueError(f"'{rest}' stands after its end")

    def value(self) -> Any:
        """Take one value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window)
                # a number that the window cuts off reads as a shorter one
                if self._is_over or self._window[end : end + 1] in tuple(",:]} \t\r\n"):
                    self._window = self._window[end:]
                    return value
            except ValueError:
                if self._is_over or len(self._window) > _MAX_ELEMENT:
                    raise
            self._grow()

    def _grow(self) -> None:
        more = self._text.read(max(_CHUNK, len(self._window)))
        self._is_over = not more
        self._window += more


def top_level(text: TextIO) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of an object; a list is yielded element by element under its key.

    Raises:
        ValueError: if it is no JSON object.
    """
    reader = _Reader(text)
    mark = reader.expect("{")
    if reader.peek() == "}":
        mark = reader.expect("}")
    while mark in "{,":
        key = reader.value()
        reader.expect(":")
        if reader.peek() == "[":
            mark = reader.expect("[")
            while reader.peek() != "]" and mark in "[,":
                yield key, reader.value()
                mark = reader.expect(",]")
            if mark != "]":
                reader.expect("]")
        else:
            yield key, reader.value()
        mark = reader.expect(",}")
    reader.expect_end()
