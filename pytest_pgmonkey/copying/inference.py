"""The types of a new table's columns, found in all values of a file.

For each column the forms of the values seen so far are kept, and one regular expression for whole
rows is made of them. It runs over blocks of the file for as long as nothing new appears: Python
looks at the values of a row only where one of them has a form that its column has not had yet.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from .records import line_end_of, split_record, whole_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .settings import Dialect

_TEXT = "text"
#: More than that without the end of a quoted value, and nothing is inferred.
_LONGEST_RECORD = 1 << 26
_RECORDS_AT_ONCE = 50
# Without a way back, which a match never needs here, it takes a quarter less time. Before Python
# 3.11.5 such a match may end in the middle of a row that does not fit.
_ALL = b"*+" if sys.version_info >= (3, 11, 5) else b"*"


def _up_to(limit: str) -> str:
    """Write a pattern of the numbers with as many digits as `limit`, and not above it."""
    smaller = (
        f"{limit[:at]}[{0 if at else 1}-{int(digit) - 1}]\\d{{{len(limit) - at - 1}}}"
        for at, digit in enumerate(limit)
        if digit > ("0" if at else "1")
    )
    return "|".join([*smaller, limit])


_EVERY_MONTH = r"(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])"
_LONG_MONTHS = r"(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31"
_LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = rf"(?!0000)(?:\d\d\d\d-(?:{_EVERY_MONTH}|{_LONG_MONTHS})|{_LEAP_YEAR}-02-29)"
# "(?:…|)" takes less time than "(?:…)?".
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d{1,6}|)|)"
_ZONE = r"(?:[+-](?:0\d|1[0-4])(?::[0-5]\d|[0-5]\d|)|Z)"
# "007" and "-0" are no numbers: as one they would not come back as they were.
_SIGN = r"(?:-(?=[0.]*[1-9]))?"
_DIGITS = r"(?:0|[1-9]\d*)"
# More digits than a double can hold are kept as text.
_AT_MOST_15 = r"(?!(?:\.?\d){16})"

#: What values look like. Where two overlap, every type with the later one has the earlier one, too.
_FORMS = {
    "boolean": "[tT][rR][uU][eE]|[fF][aA][lL][sS][eE]",
    # The common ones first: a sign that may be there takes longer, and so does counting digits.
    "integer": rf"[1-9]\d{{0,8}}|0|-[1-9]\d{{0,8}}|-?(?:{_up_to('2147483647')})|-2147483648",
    "15 digits": r"-?[1-9]\d{9,14}",
    "bigint": rf"-?(?:[1-9]\d{{15,17}}|{_up_to('9223372036854775807')})|-9223372036854775808",
    "short decimal": r"[1-9]\d{0,6}\.\d{1,8}|0\.\d{1,14}|-[1-9]\d{0,6}\.\d{1,8}|"
    rf"{_SIGN}{_AT_MOST_15}{_DIGITS}\.\d+",
    "decimal": rf"(?![-0-9.]{{1000}}){_SIGN}{_DIGITS}(?:\.\d+)?",
    "exponent": rf"{_SIGN}{_AT_MOST_15}{_DIGITS}(?:\.\d+)?[eE][+-]?\d{{1,2}}",
    "date": _DATE,
    "timestamp": rf"{_DATE}[ T]{_TIME}",
    "timestamptz": rf"{_DATE}[ T]{_TIME}{_ZONE}",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
# A set takes less time than a class of characters.
_PATTERNS = {
    name: re.compile(form.replace(r"\d", "[0-9]").encode()) for name, form in _FORMS.items()
}

#: Types and the forms that they take, narrow ones first.
_TYPES: dict[str, set[str]] = {
    "boolean": {"boolean"},
    "integer": {"integer"},
    "bigint": {"integer", "15 digits", "bigint"},
    "numeric": {"integer", "15 digits", "bigint", "short decimal", "decimal"},
    "double precision": {"integer", "15 digits", "short decimal", "exponent"},
    "date": {"date"},
    "timestamp": {"date", "timestamp"},
    "timestamp with time zone": {"timestamptz"},
    "uuid": {"uuid"},
}


def infer_types(blocks: Iterable[bytes], columns: int, dialect: Dialect) -> list[str]:
    """Give each column the first type that holds all of its values, else text.

    Where a record has more or fewer values, all is text: the server will refuse that record.
    """
    line_end, blocks = line_end_of(iter(blocks), dialect.quote)
    inference = _Inference(columns, dialect, line_end)
    end = line_end[-1:]
    # What follows the last whole record: a line end within quotes is no end.
    held: list[bytes] = []
    quoted = False
    for piece in whole_lines(blocks, end):
        held.append(piece)
        if quoted and piece.count(dialect.quote) % 2 == 0:
            if sum(map(len, held)) > _LONGEST_RECORD:
                return [_TEXT] * columns
            continue
        rest = inference.read(b"".join(held))
        if rest is None:
            return [_TEXT] * columns
        quoted = bool(rest)
        held = [rest] if quoted else []
    return [_TEXT] * columns if held else list(map(_type_of, inference.seen))


def _type_of(forms: set[str]) -> str:
    if not forms:
        return _TEXT
    return next((type_ for type_, taken in _TYPES.items() if forms <= taken), _TEXT)


class _Inference:
    """The forms that the values of each column have had so far."""

    def __init__(self, columns: int, dialect: Dialect, line_end: bytes) -> None:
        self.dialect = dialect
        self.seen: list[set[str]] = [set() for _ in range(columns)]
        self.quoted = [False] * columns
        quote, separator = re.escape(dialect.quote), re.escape(dialect.separator)
        bare = _none_of(dialect.quote + dialect.separator + b"\r\n") + _ALL
        self._quote, self._separator = quote, separator
        in_quotes = rb"%b[^%b]%b%b" % (quote, quote, _ALL, quote)
        self._any = rb"%b(?:%b%b)%b" % (bare, in_quotes, bare, _ALL)
        self._null = dialect.null.encode()
        self._end = line_end
        self.learned()

    def learned(self) -> None:
        """Make the patterns anew."""
        any_, separator = self._any, self._separator
        row = separator.join(map(self._field, self.seen, self.quoted))
        self._rows = re.compile(rb"(?:%b%b)%b" % (row, self._end, _ALL))
        self._record = re.compile(rb"(%b(?:%b%b)*)%b" % (any_, separator, any_, self._end))

    def _field(self, forms: set[str], quoted: bool) -> bytes:
        if _TEXT in forms:
            return self._any
        null = re.escape(self._null)
        if not forms:
            return null
        some = b"|".join(_PATTERNS[name].pattern for name in _FORMS if name in forms)
        in_quotes = rb"|%b(?:%b)%b" % (self._quote, some, self._quote) if quoted else b""
        return rb"(?:%b%b|%b)" % (some, in_quotes, null)

    def read(self, lines: bytes) -> bytes | None:
        """Look at whole records; gives what follows them, which ends within quotes.

        `None` where a record has not as many values as columns.
        """
        data = lines if lines.endswith(self._end) or not lines else lines + self._end
        at = 0
        while True:
            known = self._rows.match(data, at)
            assert known is not None
            at = known.end()
            if at == len(data):
                return b""
            # To make the patterns costs as much as some records: several are looked at for it.
            for _ in range(_RECORDS_AT_ONCE):
                record = self._record.match(data, at)
                if record is None:
                    return lines[at:] if data.count(self.dialect.quote, at) % 2 else None
                if not self._learn(record[1]):
                    return None
                at = record.end()
                if at == len(data):
                    break
            self.learned()

    def _learn(self, record: bytes) -> bool:
        values = _raw_values(record, self.dialect)
        if len(values) != len(self.seen):
            return False
        for index, value in enumerate(values):
            seen = self.seen[index]
            if _TEXT in seen or value == self._null:
                continue
            form, quoted = self._form(value)
            self.quoted[index] |= quoted
            seen.add(form)
            if _type_of(seen) == _TEXT:
                seen.add(_TEXT)
        return True

    def _form(self, value: bytes) -> tuple[str, bool]:
        """Give a value's form, and whether it stands in quotes."""
        quote = self.dialect.quote
        quoted = len(value) > 1 and value.startswith(quote) and value.endswith(quote)
        inner = value[1:-1] if quoted else value
        fits = (name for name, pattern in _PATTERNS.items() if pattern.fullmatch(inner))
        return next(fits, _TEXT), quoted


def _none_of(signs: bytes) -> bytes:
    """Write the set of all other characters: one that is not negated takes less time."""
    ends = sorted(signs)
    starts = [0, *(end + 1 for end in ends)]
    ranges = zip(starts, [*(end - 1 for end in ends), 255], strict=True)
    return b"[%b]" % b"".join(b"\\x%02x-\\x%02x" % pair for pair in ranges if pair[0] <= pair[1])


def _raw_values(record: bytes, dialect: Dialect) -> Sequence[bytes]:
    """Take a record apart and leave the quotes where they are."""
    starts = [field.start for field in split_record(record, dialect)]
    return [
        record[start : end - 1]
        for start, end in zip(starts, [*starts[1:], len(record) + 1], strict=True)
    ]
