"""Where each key and value of a TOML text stands, which ``tomllib`` does not tell.

The index is built by a light scan of a text that ``tomllib`` has already accepted, so it may assume that
the text is well formed and has to recognise structure only: table headers, keys, strings, inline tables.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass

Path = tuple[str, ...]

_SIMPLE_ESCAPES = set('btnfre"\\')
_WHITE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_CONTINUATION = re.compile(r"(?:\\[ \t]*\r?\n[ \t\r\n]*)*")
_BLANK = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BARE_VALUE = re.compile(r"[^,\]}#\n]*")


@dataclass(frozen=True)
class Entry:
    """Offsets into the text: of the key, of the value, and of the value's first character if a string."""

    key: int
    value: int
    quote: str = ""


class Positions:
    """Line and column (from 1) of keys, and of single characters inside string values."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.entries: dict[Path, Entry] = {}
        self._lines = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
        _Scanner(text, self.entries).scan()

    def place(self, offset: int) -> tuple[int, int]:
        line = bisect.bisect_right(self._lines, offset)
        return line, offset - self._lines[line - 1] + 1

    def line_text(self, line: int) -> str:
        start = self._lines[line - 1]
        end = self._lines[line] - 1 if line < len(self._lines) else len(self.text)
        return self.text[start:end].rstrip("\r").replace("\t", " ")

    def key(self, path: Path) -> tuple[int, int] | None:
        entry = self.entries.get(path)
        return self.place(entry.key) if entry else None

    def character(self, path: Path, column: int) -> tuple[int, int] | None:
        """Place of the ``column``-th character (from 1) of the string at ``path``."""
        entry = self.entries.get(path)
        if entry is None:
            return None
        if not entry.quote:
            return self.place(entry.value)
        offset = entry.value + len(entry.quote)
        if len(entry.quote) == 3:  # a newline right after the opening quotes is not part of the value
            offset += 2 if self.text.startswith("\r\n", offset) else self.text.startswith("\n", offset)
        for _ in range(column - 1):
            offset = self._step(offset, entry.quote)
        if entry.quote == '"""':
            offset = _CONTINUATION.match(self.text, offset).end()  # type: ignore[union-attr]
        return self.place(min(offset, len(self.text)))

    def _step(self, offset: int, quote: str) -> int:
        """Offset after one decoded character of a string."""
        text = self.text
        if text.startswith("\r\n", offset):
            return offset + 2
        if quote[0] == "'" or not text.startswith("\\", offset):
            return offset + 1
        escape = text[offset + 1 : offset + 2]
        if escape in _SIMPLE_ESCAPES:
            return offset + 2
        if escape in ("u", "U", "x"):
            return offset + {"x": 4, "u": 6, "U": 10}[escape]
        skipped = _CONTINUATION.match(text, offset)  # a line continuation is no character at all
        return self._step(skipped.end(), quote) if skipped and skipped.end() > offset else offset + 1


class _Scanner:
    def __init__(self, text: str, entries: dict[Path, Entry]) -> None:
        self.text = text
        self.entries = entries
        self.at = 0

    def scan(self) -> None:
        table: Path = ()
        self.skip(_WHITE)
        while self.at < len(self.text):
            before = self.at
            if self.text[self.at] == "[":
                start = self.at
                self.at += 2 if self.text.startswith("[[", self.at) else 1
                table = self.key_path()
                self.add(table, Entry(start, start))
                line_end = self.text.find("\n", self.at)
                self.at = line_end if line_end >= 0 else len(self.text)
            else:
                self.pair(table, 0)
            self.skip(_WHITE)
            if self.at <= before:  # never loop on a text that tomllib understood and this scan does not
                return

    def add(self, path: Path, entry: Entry) -> None:
        for length in range(1, len(path)):
            self.entries.setdefault(path[:length], entry)
        self.entries[path] = entry

    def skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        if match:
            self.at = match.end()

    def key_path(self) -> Path:
        parts: list[str] = []
        while len(parts) < 16:  # deeper keys are unknown keys of the language anyway
            self.skip(_BLANK)
            parts.append(self.key_part())
            self.skip(_BLANK)
            if not self.text.startswith(".", self.at):
                break
            self.at += 1
        return tuple(parts)

    def key_part(self) -> str:
        quote = self.text[self.at : self.at + 1]
        if quote in ("'", '"') and quote:
            start = self.at
            self.string()
            return self.text[start + 1 : self.at - 1]
        match = _BARE_KEY.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match.group()

    def pair(self, table: Path, depth: int) -> None:
        start = self.at
        path = table + self.key_path()
        equals = self.text.find("=", self.at)
        self.at = equals + 1 if equals >= 0 else len(self.text)
        self.skip(_BLANK)
        value = self.at
        quote = self.value(path, depth)
        self.add(path, Entry(start, value, quote))

    def value(self, path: Path, depth: int) -> str:
        head = self.text[self.at : self.at + 1]
        if head in ("'", '"') and head:
            return self.string()
        if head == "{" and depth < 16:
            self.at += 1
            while True:
                self.skip(_WHITE)
                if self.at >= len(self.text) or self.text[self.at] == "}":
                    self.at += 1
                    return ""
                if self.text[self.at] == ",":
                    self.at += 1
                    continue
                self.pair(path, depth + 1)
        if head in ("[", "{"):
            self.brackets()
        else:
            self.skip(_BARE_VALUE)
        return ""

    def brackets(self) -> None:
        depth = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in "'\"":
                self.string()
                continue
            if char == "#":
                self.skip(_WHITE)
                continue
            depth += (char in "[{") - (char in "]}")
            self.at += 1
            if depth == 0:
                return

    def string(self) -> str:
        """Pass over a string; returns its opening quotes."""
        quote = self.text[self.at]
        if self.text.startswith(quote * 3, self.at):
            quote *= 3
        at = self.at + len(quote)
        while at < len(self.text):
            if self.text[at] == "\\" and quote[0] == '"':
                at += 2
            elif self.text.startswith(quote, at):
                at += len(quote)
                if len(quote) == 3:  # up to two quotes may stand right before the closing three
                    at += next((n for n in (2, 1) if self.text.startswith(quote[0] * n, at)), 0)
                break
            else:
                at += 1
        self.at = at
        return quote
