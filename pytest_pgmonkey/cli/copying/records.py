"""Records of CSV as PostgreSQL's reader sees them: where they end, what values they hold.

A quote character opens or closes quoting wherever it stands, so whether a place is quoted is a
matter of counting. All of it works on bytes in which ASCII stands for itself.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..common import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .settings import Dialect

__all__ = [
    "Field",
    "Head",
    "Record",
    "find_record",
    "find_values",
    "guard_end_marker",
    "newlines",
    "read_head",
    "split_record",
]

#: A header that is longer has most likely a quote that never ends.
LONGEST_HEADER = 1 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True)
class Field:
    """One value of a record, and where in the record it begins."""

    start: int
    value: bytes
    quoted: bool


@dataclass(frozen=True)
class Record:
    """One record, without its line end, and the line of the file on which it begins."""

    line: int
    data: bytes
    #: A quoted value in it never ends.
    unended: bool = False


def newlines(data: bytes) -> int:
    """Count line ends as editors do."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def split_record(data: bytes, dialect: Dialect) -> list[Field]:
    """Take a record apart."""
    quote, separator = re.escape(dialect.quote), re.escape(dialect.separator)
    quoted = rb"%b[^%b]*(?:%b|\Z)" % (quote, quote, quote)
    section = re.compile(rb"%b|[^%b%b]+" % (quoted, quote, separator), re.DOTALL)
    fields, start = [], 0
    while True:
        parts, end = [], start
        while match := section.match(data, end):
            parts.append(match[0])
            end = match.end()
        fields.append(_field(start, parts, dialect.quote))
        if end >= len(data):
            return fields
        start = end + 1


def _field(start: int, parts: list[bytes], quote: bytes) -> Field:
    value, after_quoted = b"", False
    for part in parts:
        quoted = part.startswith(quote)
        if quoted:
            # Two quoted sections in a row are one with a doubled quote in it.
            value += (quote if after_quoted else b"") + part[1:].removesuffix(quote)
        else:
            value += part
        after_quoted = quoted
    return Field(start, value, any(part.startswith(quote) for part in parts))


# --- the header ---


@dataclass(frozen=True)
class Head:
    """The first record of the data, `None` where there is none, and how to go on."""

    record: Record | None
    #: The lines of the file up to the record's end.
    lines: int
    _data: bytes
    _end: int
    _blocks: Iterator[bytes]

    def rest(self) -> Iterator[bytes]:
        """Give the data after the record."""
        return _chained(self._data[self._end :], self._blocks)

    def whole(self) -> Iterator[bytes]:
        """Give all of the data, the record included."""
        return _chained(self._data, self._blocks)


def read_head(blocks: Iterator[bytes], quote: bytes, name: str) -> Head:
    """Read the first record; empty lines before it are passed over."""
    data, found = b"", None
    for block in blocks:
        data += block
        # The last byte may be the first half of a line end.
        found = _first_end(data[:-1], quote)
        if found is not None:
            break
        if len(data) > LONGEST_HEADER:
            raise CommandError(
                f"{name}: the first record does not end within {LONGEST_HEADER} bytes; "
                "is the quote character right?"
            )
    start, end = found or _first_end(data, quote) or (_start(data), len(data))
    line_end = _LINE_END.match(data, end)
    rest = line_end.end() if line_end else end
    record = None
    if start < end:
        unended = data.count(quote, start, end) % 2 == 1
        record = Record(newlines(data[:start]) + 1, data[start:end], unended)
    return Head(record, newlines(data[:rest]), data, rest, blocks)


def _start(data: bytes) -> int:
    return len(data) - len(data.lstrip(b"\r\n"))


def _first_end(data: bytes, quote: bytes) -> tuple[int, int] | None:
    start = _start(data)
    quoted = False
    for match in re.finditer(rb"[\r\n]|" + re.escape(quote), data[start:]):
        if match[0] == quote:
            quoted = not quoted
        elif not quoted:
            return start, start + match.start()
    return None


def _chained(first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from blocks


# --- the record of which the server complains ---


def find_record(blocks: Iterable[bytes], quote: bytes, number: int) -> Record | None:
    """Find the record in which the server's line `number` lies.

    The server counts the line ends that are like the first one, within quotes too.
    """
    return next((each for counted, each in _records(blocks, quote) if counted >= number), None)


def find_values(
    blocks: Iterable[bytes], dialect: Dialect, wanted: Mapping[int, bytes]
) -> Record | None:
    """Find the first record that has these values in these positions."""
    for _, record in _records(blocks, dialect.quote):
        if all(value in record.data for value in wanted.values()):
            values = [field.value for field in split_record(record.data, dialect)]
            if all(values[index : index + 1] == [value] for index, value in wanted.items()):
                return record
    return None


def _records(blocks: Iterable[bytes], quote: bytes) -> Iterator[tuple[float, Record]]:
    """Give all records, each with the number that the server gives to its last line."""
    lines, end = _lines(iter(blocks), quote)
    held: list[bytes] = []
    quoted, file_line, counted = False, 1, 0
    for line in lines:
        held.append(line)
        quoted ^= line.count(quote) % 2 == 1
        if quoted:
            continue
        data = b"".join(held)
        # As long as the server has seen no line end, it takes "\r" for those within quotes.
        counted += len(held) if counted or end == b"\r" else 1 + data[:-2].count(b"\r")
        yield counted, _record(file_line, data, end, unended=False)
        file_line += newlines(data) if end == b"\n" else newlines(data.lstrip(b"\n"))
        held.clear()
    if held:
        yield math.inf, _record(file_line, b"".join(held), end, unended=True)


def _record(line: int, data: bytes, end: bytes, *, unended: bool) -> Record:
    if end == b"\r":
        data = data.removeprefix(b"\n")  # The second half of the line end before.
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    return Record(line, data, unended)


def _lines(blocks: Iterator[bytes], quote: bytes) -> tuple[Iterator[bytes], bytes]:
    """Give all lines, with their ends, and the sign at which they are cut."""
    start = b""
    for block in blocks:
        start += block
        found = _first_end(start, quote)
        if found is not None:
            break
    else:
        found = _first_end(start, quote)
    end = start[found[1] : found[1] + 1] if found else b"\n"
    return _cut(_chained(start, blocks), end), end


def _cut(blocks: Iterator[bytes], end: bytes) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        pieces = block.split(end)
        for piece in pieces[:-1]:
            yield b"".join([*rest, piece, end])
            rest.clear()
        rest.append(pieces[-1])
    last = b"".join(rest)
    if last and not (end == b"\r" and last == b"\n"):
        yield last


# --- a value that older servers take for the end of all data ---

_MARKER = re.compile(rb"(?:\A|(?<=[\r\n]))\\\.(?=[\r\n]|\Z)")


def guard_end_marker(blocks: Iterable[bytes], quote: bytes) -> Iterator[bytes]:
    r"""Quote each record that is a bare `\.`: before PostgreSQL 18 it ends the data in silence."""
    odd = False
    for piece in _whole_lines(blocks):
        quotes = piece.count(quote)
        if b"\\." in piece:
            yield _guarded(piece, quote, odd)
        else:
            yield piece
        odd ^= quotes % 2 == 1


def _guarded(piece: bytes, quote: bytes, odd: bool) -> bytes:
    def replaced(match: re.Match[bytes]) -> bytes:
        inside = (piece.count(quote, 0, match.start()) % 2 == 1) ^ odd
        return match[0] if inside else quote + match[0] + quote

    return _MARKER.sub(replaced, piece)


def _whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        cut = block.rfind(b"\n") + 1 or block.rfind(b"\r") + 1
        if not cut:
            rest.append(block)
            continue
        if rest:
            yield b"".join([*rest, block[:cut]])
            rest.clear()
        else:
            yield block[:cut]
        if cut < len(block):
            rest.append(block[cut:])
    if rest:
        yield b"".join(rest)
