"""Where in the user's code a connection was borrowed, for messages."""

from __future__ import annotations

import os
import sys
from typing import Final, NamedTuple

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
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").split(".", 1)[0] not in _PASSED_OVER:
            break
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno)
