"""Where in the user's code a connection was borrowed, for messages."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from types import FrameType

_PACKAGE: Final = __name__.split(".", 1)[0]
_PASSED_OVER: Final = frozenset((_PACKAGE, "contextlib", "psycopg", "psycopg_pool", "asyncio"))


class Place(NamedTuple):
    """A line of user code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.relpath(self.file)}:{self.line}"


def caller() -> Place:
    """Give the innermost line that belongs neither to the kit nor to psycopg."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_passed_over(frame.f_code.co_filename, frame):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno)


_known: Final[dict[str, bool]] = {}


def _is_passed_over(file: str, frame: FrameType) -> bool:
    known = _known.get(file)
    if known is None:
        module = str(frame.f_globals.get("__name__", ""))
        known = _known[file] = module.split(".", 1)[0] in _PASSED_OVER
    return known
