"""How a CSV file is written: the options of both commands, and the file beside it.

The options are added without importing anything heavy; `file_settings` is for the command that
runs. The file beside `people.csv` is `people.yaml`, with the names of the original pgmonkey; what
is given as an option takes its place.
"""

from __future__ import annotations

import argparse
import os

from ..common import CommandError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .encodings import Encoding

__all__ = [
    "Dialect",
    "add_csv_options",
    "apply_sidecar",
    "column_list",
    "dialect",
    "encoding",
]

#: What a tab, which is hard to type, may be called.
_TABS = ("tab", "\\t")


class Dialect:
    """The signs of a CSV file, as COPY takes them."""

    __slots__ = ("delimiter", "null", "quotechar")

    def __init__(self, delimiter: str, quotechar: str, null: str) -> None:
        self.delimiter = delimiter
        self.quotechar = quotechar
        self.null = null

    @property
    def quote(self) -> bytes:
        return self.quotechar.encode()

    @property
    def separator(self) -> bytes:
        return self.delimiter.encode()


# --- options ---


def add_csv_options(parser: argparse.ArgumentParser) -> None:
    """Add what import and export have in common."""
    parser.add_argument(
        "--columns",
        type=column_list,
        metavar="A,B,...",
        help='columns, in the order of the file; a name with a comma in it as "a,b"',
    )
    parser.add_argument(
        "--header",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the first record holds the columns' names (default)",
    )
    parser.add_argument(
        "--delimiter", type=_sign, metavar="C", help="between two values; 'tab' (default: ,)"
    )
    parser.add_argument("--quotechar", type=_sign, metavar="C", help='around values (default: ")')
    parser.add_argument(
        "--null", metavar="TEXT", help="what stands for NULL where unquoted (default: nothing)"
    )
    parser.add_argument(
        "--encoding", metavar="NAME", help="by Python's or PostgreSQL's name (default: utf-8)"
    )


def _sign(text: str) -> str:
    problem = _judge_sign(text)
    if problem:
        raise argparse.ArgumentTypeError(f"{text!r} {problem}")
    return _named_sign(text)


def _named_sign(text: str) -> str:
    return "\t" if text.lower() in _TABS else text


def _judge_sign(text: object) -> str | None:
    if not isinstance(text, str):
        return "must be one character, in quotes"
    sign = _named_sign(text)
    if len(sign) != 1 or not sign.isascii() or sign in "\r\n\0":
        return "must be one ASCII character, and no line end"
    return None


def column_list(text: str) -> list[str]:
    """Take names apart at commas; quotes keep a name together, doubled ones stand for one."""
    names, rest = [], text
    while True:
        name, rest = _quoted_name(rest) if rest.startswith('"') else _bare_name(rest)
        if not name:
            raise argparse.ArgumentTypeError(f"{text!r} holds an empty name")
        names.append(name)
        if not rest:
            break
        if not rest.startswith(","):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of names")
        rest = rest[1:].lstrip()
    for name in names:
        if names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is named twice")
    return names


def _bare_name(text: str) -> tuple[str, str]:
    name, comma, rest = text.partition(",")
    return name.strip(), comma + rest


def _quoted_name(text: str) -> tuple[str, str]:
    name, at = "", 1
    while at < len(text):
        if text[at] != '"':
            name += text[at]
        elif text[at + 1 : at + 2] == '"':
            name += '"'
            at += 1
        else:
            return name, text[at + 1 :].lstrip()
        at += 1
    raise argparse.ArgumentTypeError(f"{text!r} has a quote that never ends")


# --- the file beside it ---

_SHARED: Mapping[str, str] = {
    "delimiter": "delimiter",
    "quotechar": "quotechar",
    "encoding": "encoding",
    "null": "null",
    "has_headers": "header",
}
_IMPORT: Mapping[str, str] = {
    **_SHARED,
    "auto_create_table": "create_table",
    "enforce_lowercase": "lowercase",
}


def apply_sidecar(args: argparse.Namespace, csv_path: str) -> None:
    """Put what the file beside a CSV file says where no option does."""
    from ...config import read_mapping

    path = _sidecar(csv_path)
    if path is None or _same_file(path, args.path):
        return
    known = _IMPORT if hasattr(args, "create_table") else _SHARED
    found = read_mapping(path)
    if not any(name in _IMPORT for name in found):
        return  # Some other file that happens to have this name.
    for name, value in found.items():
        if name not in _IMPORT:
            raise _wrong(path, name, "unknown key", f"known are {', '.join(known)}")
        if name in known and value is not None and getattr(args, known[name]) is None:
            setattr(args, known[name], _judged(path, name, value))
    say(f"{path}: settings taken from it")


def _sidecar(csv_path: str) -> str | None:
    if csv_path == "-":
        return None
    stem = csv_path[:-3] if csv_path.lower().endswith(".gz") else csv_path
    path = os.path.splitext(stem)[0] + ".yaml"
    return path if os.path.isfile(path) else None


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, os.path.expanduser(other))
    except OSError:
        return False


def _judged(path: str, name: str, value: Any) -> Any:
    if name in ("delimiter", "quotechar"):
        problem = _judge_sign(value)
        if problem:
            raise _wrong(path, name, problem)
        return _named_sign(value)
    if name in ("encoding", "null"):
        if not isinstance(value, str):
            raise _wrong(path, name, "must be a string, in quotes")
        return value
    if not isinstance(value, bool):
        raise _wrong(path, name, "must be true or false")
    return value


def _wrong(path: str, name: str, problem: str, hint: str | None = None) -> Exception:
    from ...errors import ConfigError

    return ConfigError(problem, path, name, hint)


# --- what holds in the end ---


def dialect(args: argparse.Namespace) -> Dialect:
    """Give the signs that hold, defaults filled in; contradictions are wrong usage."""
    delimiter = "," if args.delimiter is None else args.delimiter
    quotechar = '"' if args.quotechar is None else args.quotechar
    null = args.null or ""
    error: Callable[[str], None] = args.parser.error
    if delimiter == quotechar:
        error("--delimiter and --quotechar must differ")
    if set(null) & {delimiter, quotechar, "\r", "\n"}:
        error("--null must hold neither the delimiter nor the quote character nor a line end")
    return Dialect(delimiter, quotechar, null)


def encoding(args: argparse.Namespace) -> Encoding | None:
    """Give the encoding that is asked for, if any."""
    from .encodings import find_encoding

    if args.encoding is None:
        return None
    try:
        return find_encoding(args.encoding)
    except LookupError:
        raise CommandError(
            f"unknown encoding {args.encoding!r}: give a name that Python or PostgreSQL knows"
        ) from None
