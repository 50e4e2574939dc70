"""What a client of the gateway wants."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Purpose"]


class Purpose(IntEnum):
    """What a client wants; the port that it connects to tells."""

    SESSION = 0
    """It lives on from test to test."""
    TEST = 1
    """It ends with the running test."""
    PEEK = 2
    """It only looks at what the running test has written."""
