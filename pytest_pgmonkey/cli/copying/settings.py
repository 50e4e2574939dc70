"""How a CSV file is written: the options, and the file beside it.

The file beside `people.csv` is `people.yaml`, with the names of the original pgmonkey; what is
given as an option takes its place.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg import sql

from ...config import read_mapping
from ...errors import ConfigError
from ..options import sign
from ..running import CommandError, say
from .encodings import find_encoding

if TYPE_CHECKING:
    from argparse import Namespace

    from .encodings import Encoding


@dataclass(frozen=True)
class Dialect:
    """The signs of a CSV file, as COPY takes them."""

    delimiter: str
    quotechar: str
    null: str

    @property
    def quote(self) -> bytes:
        return self.quotechar.encode()

    @property
    def separator(self) -> bytes:
        return self.delimiter.encode()

    def options(self, encoding: Encoding) -> sql.Composed:
        """Write them as options of COPY."""
        options = "FORMAT csv, DELIMITER {}, QUOTE {}, NULL {}, ENCODING {}"
        values = (self.delimiter, self.quotechar, self.null, encoding.sent_as)
        return sql.SQL(options).format(*values)


def dialect(args: Namespace) -> Dialect:
    """Give the signs that hold, defaults filled in; contradictions are wrong usage."""
    delimiter, quotechar, null = args.delimiter or ",", args.quotechar or '"', args.null or ""
    if delimiter == quotechar:
        args.parser.error("--delimiter and --quotechar must differ")
    if set(null) & {delimiter, quotechar, "\r", "\n"}:
        args.parser.error(
            "--null must hold neither the delimiter nor the quote character nor a line end"
        )
    return Dialect(delimiter, quotechar, null)


def encoding(args: Namespace) -> Encoding | None:
    """Give the encoding that is asked for, if any."""
    try:
        return None if args.encoding is None else find_encoding(args.encoding)
    except LookupError:
        raise CommandError(
            f"unknown encoding {args.encoding!r}: give a name that Python or PostgreSQL knows"
        ) from None


# --- the file beside it ---

_EXPORT = {
    "delimiter": "delimiter",
    "quotechar": "quotechar",
    "encoding": "encoding",
    "null": "null",
    "has_headers": "header",
}
_IMPORT = {**_EXPORT, "auto_create_table": "create_table", "enforce_lowercase": "lowercase"}


def apply_sidecar(args: Namespace, csv_path: str) -> None:
    """Put what the file beside a CSV file says where no option does."""
    unpacked = csv_path[:-3] if csv_path.lower().endswith(".gz") else csv_path
    path = os.path.splitext(unpacked)[0] + ".yaml"
    if csv_path == "-" or not os.path.isfile(path) or _is_same_file(path, args.path):
        return
    known = _IMPORT if "create_table" in args else _EXPORT
    found = read_mapping(path)
    if not any(name in _IMPORT for name in found):
        return  # Some other file that happens to have this name.
    for name, value in found.items():
        if name not in _IMPORT:
            raise ConfigError("unknown key", path, name, f"known are {', '.join(known)}")
        if name in known and value is not None and getattr(args, known[name]) is None:
            try:
                setattr(args, known[name], _judged(name, value))
            except ArgumentTypeError as error:
                raise ConfigError(str(error), path, name) from None
    say(f"{path}: settings taken from it")


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, os.path.expanduser(other))
    except OSError:
        return False


def _judged(name: str, value: Any) -> Any:
    if name in ("delimiter", "quotechar"):
        return sign(value)
    if name in ("encoding", "null"):
        if not isinstance(value, str):
            raise ArgumentTypeError("must be a string, in quotes")
    elif not isinstance(value, bool):
        raise ArgumentTypeError("must be true or false")
    return value
