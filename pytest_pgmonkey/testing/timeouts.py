"""The server's time-outs that would end the test's transaction, kept at 0; asks no server.

Each has a shadow, a setting of ours with the value that the application would find on a session of
its own. While one of its statements looks at these settings they have that value; it is parked in
the shadow again when the statement has ended. So the shadow follows savepoints, rollbacks and
handovers like any other setting.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAMES: Final = (
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "transaction_timeout",
)
_SHADOW: Final = "pgmonkey."
_WORDS: Final = ("timeout", "pg_settings", "show", "reset", "discard")
_LOOKS: Final = re.compile(
    rf"{'|'.join(NAMES)}|pg_settings|\bshow\s+all\b|\breset\s+all\b|\bdiscard\s+all\b",
    re.IGNORECASE,
)


def looks_at_timeouts(text: str) -> bool:
    """Whether a statement sets or shows one of them, as far as its text tells."""
    lowered = text.lower()
    # A statement may be of megabytes, for which the expression takes a second.
    return any(word in lowered for word in _WORDS) and _LOOKS.search(text) is not None


def with_shadows(names: Iterable[str]) -> tuple[str, ...]:
    """Give the names of settings, and those of their shadows."""
    names = tuple(names)
    return names + tuple(_SHADOW + name for name in names if name in NAMES)


class Timeouts:
    """Those of one server, given with the values that a new session has."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._names: Final = ", ".join(f"'{name}'" for name in values)
        self.differ: Final = any(value != "0" for value in values.values())
        """Whether the role, the database or the server sets any."""

    def park(self) -> bytes:
        """Give the command that keeps their values in the shadows, and lets none end anything."""
        return (
            f"SELECT pg_catalog.set_config('{_SHADOW}' || n, pg_catalog.current_setting(n), false)"
            f", pg_catalog.set_config(n, '0', false) FROM pg_catalog.unnest(ARRAY[{self._names}]) n"
        ).encode()

    def unpark(self) -> bytes:
        """Give the command after which they have the application's values."""
        shadow = f"pg_catalog.current_setting('{_SHADOW}' || n, true)"
        return (
            f"SELECT pg_catalog.set_config(n, {shadow}, false) "
            f"FROM pg_catalog.unnest(ARRAY[{self._names}]) n WHERE {shadow} <> ''"
        ).encode()

    def after_reset(self, given: Iterable[str] = ()) -> list[bytes]:
        """Give what must follow RESET ALL and the settings of a file."""
        return [self.park()] if self.differ or not set(NAMES).isdisjoint(given) else []
