"""The file beside a CSV file: `people.yaml` for `people.csv`, with the original pgmonkey's names.

What is given as an option takes its place.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ...config import read_mapping
from ...copying.names import as_sign
from ...errors import ConfigError
from ..running import say

if TYPE_CHECKING:
    from argparse import Namespace

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
    if found and not any(name in _IMPORT for name in found):
        raise ConfigError(
            f"has none of the settings of {csv_path}",
            path,
            hint=f"known are {', '.join(known)}; a file with another purpose needs another name",
        )
    for name, value in found.items():
        if name not in _IMPORT:
            raise ConfigError("unknown key", path, name, f"known are {', '.join(known)}")
        if name in known and value is not None and getattr(args, known[name]) is None:
            try:
                setattr(args, known[name], _judged(name, value))
            except ValueError as error:
                raise ConfigError(str(error), path, name) from None
    say(f"{path}: settings taken from it")


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, os.path.expanduser(other))
    except OSError:
        return False


def _judged(name: str, value: Any) -> Any:
    if name in ("delimiter", "quotechar"):
        return as_sign(value)
    if name in ("encoding", "null"):
        if not isinstance(value, str):
            raise ValueError("must be a string, in quotes")
    elif not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value
