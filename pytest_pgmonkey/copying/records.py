"""Records of CSV as PostgreSQL's reader sees them: where they end, what values they hold.

A quote character opens or closes quoting wherever it stands, so whether a place is quoted is a
matter of counting. All of it works on bytes in which ASCII stands for itself.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from ..errors import CSVError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .settings import Dialect

#: A header that is longer has most likely a quote that never ends.
LONGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class Field:
    """One value of a record, and where in the record it begins."""

    start: int
    value: bytes


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
    quoted = rb"Q((?:[^Q]|QQ)*)(?:Q|\Z)".replace(b"Q", quote)
    field = re.compile(rb"(?:%b|[^%b%b])*" % (quoted, quote, separator))
    fields, end = [], -1
    while end < len(data):
        match = field.match(data, end + 1)
        assert match is not None
        value = re.sub(
            quoted, lambda part: part[1].replace(dialect.quote * 2, dialect.quote), match[0]
        )
        fields.append(Field(match.start(), value))
        end = match.end()
    return fields


def other_delimiter(data: bytes, dialect: Dialect) -> str | None:
    """Give the delimiter that a record of one value seems to have instead, if any."""
    quote = re.escape(dialect.quote)
    bare = re.sub(quote + rb"[^" + quote + rb"]*" + quote, b"", data).decode("latin-1")
    counts = {sign: bare.count(sign) for sign in ",;\t|" if sign != dialect.delimiter}
    likely = max(counts, key=counts.__getitem__)
    return likely if counts[likely] else None


# --- the header ---


@dataclass(frozen=True)
class Head:
    """The first record of the data, `None` where there is none, and how to go on."""

    record: Record | None
    #: The lines of the file up to the record's end.
    lines: int
    #: The data up to the record's end, and after it.
    data: bytes
    rest: Iterator[bytes]


def read_head(blocks: Iterator[bytes], quote: bytes, name: str) -> Head:
    """Read the first record; empty lines before it are passed over."""
    data, end = _until_first_end(blocks, quote)
    if end is None and len(data) > LONGEST_HEADER:
        raise CSVError(
            f"{name}: the first record does not end within {LONGEST_HEADER} bytes",
            "is the quote character right?",
            file=name,
            line=1,
        )
    start, end = _start(data), len(data) if end is None else end
    line_end = re.compile(rb"(?:\r\n|\n|\r)?").match(data, end)
    assert line_end is not None
    head = data[: line_end.end()]
    unended = data.count(quote, start, end) % 2 == 1
    record = Record(newlines(data[:start]) + 1, data[start:end], unended) if start < end else None
    return Head(record, newlines(head), head, chain([data[len(head) :]], blocks))


def _until_first_end(blocks: Iterator[bytes], quote: bytes) -> tuple[bytes, int | None]:
    """Read on until the first record is complete; gives the data and where the record ends."""
    data, end = b"", None
    for block in blocks:
        data += block
        # The last byte may be the first half of a line end.
        end = _first_end(data[:-1], quote)
        if end is not None or len(data) > LONGEST_HEADER:
            return data, end
    return data, _first_end(data, quote)


def _start(data: bytes) -> int:
    return len(data) - len(data.lstrip(b"\r\n"))


def _first_end(data: bytes, quote: bytes) -> int | None:
    quoted = False
    for match in re.compile(rb"[\r\n]|" + re.escape(quote)).finditer(data, _start(data)):
        if match[0] == quote:
            quoted = not quoted
        elif not quoted:
            return match.start()
    return None


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
    line_end, blocks = line_end_of(iter(blocks), quote)
    end = line_end[:1]
    held: list[bytes] = []
    quoted, file_line, counted = False, 1, 0
    for line in _lines(blocks, end):
        held.append(line)
        quoted ^= line.count(quote) % 2 == 1
        if quoted:
            continue
        data = b"".join(held)
        # As long as the server has seen no line end, it takes "\r" for those within quotes.
        counted += len(held) if counted or end == b"\r" else 1 + data[:-2].count(b"\r")
        yield counted, Record(file_line, _without_end(data, end))
        file_line += newlines(data) if end == b"\n" else newlines(data.lstrip(b"\n"))
        held.clear()
    if held:
        yield math.inf, Record(file_line, _without_end(b"".join(held), end), unended=True)


def line_end_of(blocks: Iterator[bytes], quote: bytes) -> tuple[bytes, Iterator[bytes]]:
    """Give the first line end, which the server expects of all others, and all the data."""
    start, at = _until_first_end(blocks, quote)
    found = None if at is None else re.compile(rb"\r\n|[\r\n]").match(start, at)
    return found[0] if found else b"\n", chain([start], blocks)


def _without_end(data: bytes, end: bytes) -> bytes:
    if end == b"\r":
        data = data.removeprefix(b"\n")  # The second half of the line end before.
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _lines(blocks: Iterable[bytes], end: bytes) -> Iterator[bytes]:
    """Give all lines, with their ends."""
    last = b""
    for piece in whole_lines(blocks, end):
        *lines, last = piece.split(end)
        yield from (line + end for line in lines)
    if last and not (end == b"\r" and last == b"\n"):
        yield last


def whole_lines(blocks: Iterable[bytes], *ends: bytes) -> Iterator[bytes]:
    """Cut the data anew, each piece but the last behind the first of these ends that it has."""
    rest: list[bytes] = []
    for block in blocks:
        cut = next((at for end in ends if (at := block.rfind(end) + 1)), 0)
        if cut:
            yield b"".join([*rest, block[:cut]])
            rest.clear()
        rest.append(block[cut:])
    yield b"".join(rest)


# --- blank lines at the end ---


def without_blank_end(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Leave out blank lines at the end of the data; the server would take each for a record."""
    held: list[bytes] = []
    for block in blocks:
        kept = block.rstrip(b"\r\n")
        if kept and held:
            yield b"".join(held)
            held.clear()
        if kept:
            yield kept
        held.append(block[len(kept) :])
    first = re.match(rb"\r\n|\r|\n|", b"".join(held))
    assert first is not None
    yield first[0]


# --- a value that older servers take for the end of all data ---


def guard_end_marker(blocks: Iterable[bytes], quote: bytes) -> Iterator[bytes]:
    r"""Quote each record that is a bare `\.`: before PostgreSQL 18 it ends the data in silence."""
    # A quoted section is passed over as a whole.
    pattern = rb"(Q[^Q]*(?:Q|\Z))|(?:\A|(?<=[\r\n]))\\\.(?=[\r\n]|\Z)"
    marker = re.compile(pattern.replace(b"Q", re.escape(quote)))
    before = b""
    for piece in whole_lines(blocks, b"\n", b"\r"):
        if b"\\." in piece:
            guarded = marker.sub(lambda part: part[1] or quote + part[0] + quote, before + piece)
            yield guarded[len(before) :]
        else:
            yield piece
        if piece.count(quote) % 2:
            # The next piece begins within quotes.
            before = b"" if before else quote
