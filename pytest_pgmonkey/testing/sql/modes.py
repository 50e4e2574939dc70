"""The transaction modes that a BEGIN or a SET TRANSACTION names."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

_ISOLATION: Final = re.compile(
    rb"ISOLATION\s+LEVEL\s+(SERIALIZABLE|REPEATABLE\s+READ|READ\s+COMMITTED|READ\s+UNCOMMITTED)",
    re.IGNORECASE,
)
_READ: Final = re.compile(rb"READ\s+(ONLY|WRITE)", re.IGNORECASE)


class Modes(NamedTuple):
    """Isolation level, `b""` where none is named, and READ ONLY or not, `None` likewise."""

    isolation: bytes = b""
    read_only: bool | None = None

    def over(self, other: Modes) -> Modes:
        """Give these modes, and the other's where these name none."""
        read_only = other.read_only if self.read_only is None else self.read_only
        return Modes(self.isolation or other.isolation, read_only)


@lru_cache(maxsize=256)
def transaction_modes(command: bytes) -> Modes:
    """Read the modes of a BEGIN, START TRANSACTION or SET TRANSACTION."""
    found = _ISOLATION.search(command)
    isolation = b" ".join(found.group(1).upper().split()) if found else b""
    if isolation == b"READ UNCOMMITTED":
        isolation = b"READ COMMITTED"  # the same thing in PostgreSQL
    read = _READ.search(_ISOLATION.sub(b"", command))
    return Modes(isolation, None if read is None else read.group(1).upper() == b"ONLY")
