"""Where a connection comes from, for messages: a line of the user's code, or a client."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from types import CodeType, FrameType

_PACKAGE: Final = __name__.split(".", 1)[0]
_PACKAGES: Final = frozenset((_PACKAGE, "contextlib", "psycopg", "psycopg_pool", "asyncio"))


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


class Left(NamedTuple):
    """What a test has left at its end: a connection, and whether it had changed something."""

    origin: Origin
    has_changes: bool
    """In a transaction that was open."""


def caller() -> Place:
    """Give the innermost line that belongs neither to the kit nor to psycopg."""
    frame = _outwards(sys._getframe(2))
    return Place(frame.f_code.co_filename, frame.f_lineno)


def user_code(depth: int) -> tuple[CodeType, int]:
    """Give the same as a code object and an instruction in it, of which a line costs nothing yet.

    `depth` is the number of callers that are the kit's for sure.
    """
    frame = sys._getframe(depth + 1)
    code = frame.f_code
    if _passed_over.get(code.co_filename) is not False:
        frame = _outwards(frame)
        code = frame.f_code
    return code, frame.f_lasti


def _outwards(frame: FrameType) -> FrameType:
    """Give the innermost caller that belongs to the user."""
    while (passed := _passed_over.get(frame.f_code.co_filename)) is not False:
        if passed is None:
            _judge(frame)
        elif frame.f_back is None:
            break
        else:
            frame = frame.f_back
    return frame


# By file; each statement pays for the question.
_passed_over: Final[dict[str, bool]] = {}


def _judge(frame: FrameType) -> None:
    module = str(frame.f_globals.get("__name__", ""))
    _passed_over[frame.f_code.co_filename] = module.split(".", 1)[0] in _PACKAGES
