"""Where a connection comes from, for messages: a line of the user's code, or a client."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from types import FrameType

_PACKAGE: Final = __name__.split(".", 1)[0]
_PASSED_OVER: Final = frozenset((_PACKAGE, "contextlib", "psycopg", "psycopg_pool", "asyncio"))


class Place(NamedTuple):
    """The line of user code where a connection was borrowed."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"the connection borrowed at {os.path.relpath(self.file)}:{self.line}"


class Peer(NamedTuple):
    """A client in whatever process."""

    application: str
    pid: int
    port: int = 0

    def __str__(self) -> str:
        by = repr(self.application) if self.application else "a client"
        known = [("process", self.pid), ("port", self.port)]
        where = ", ".join(f"{name} {number}" for name, number in known if number)
        return f"the connection of {by}" + (f" ({where})" if where else "")


Origin = Place | Peer


def caller() -> Place:
    """Give the innermost line that belongs neither to the kit nor to psycopg."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_passed_over(frame.f_code.co_filename, frame):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno)


_known: Final[dict[str, bool]] = {}


def is_passed_over(file: str, frame: FrameType) -> bool:
    """Whether a frame is the kit's, psycopg's or asyncio's: nobody looks for a cause there."""
    known = _known.get(file)
    if known is None:
        module = str(frame.f_globals.get("__name__", ""))
        known = _known[file] = module.split(".", 1)[0] in _PASSED_OVER
    return known
