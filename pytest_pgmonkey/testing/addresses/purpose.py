"""What a client comes to the gateway for."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Purpose"]


class Purpose(IntEnum):
    """What a client has come for, told by the port that it came to."""

    SESSION = 0
    """It lives on from test to test."""
    TEST = 1
    """It ends with the running test."""
    PEEK = 2
    """It only looks at what the running test has written."""
