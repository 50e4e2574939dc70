"""Lines of a report in parts that say what they are, for plain text and for colours."""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    #: Parts of text, each with its role.
    Line = Sequence[tuple["Role", str]]

__all__ = ["Role", "coloured", "cut", "cut_line", "plain", "visible"]

# A terminal would obey them, or show what follows in another order.
_OBEYED: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Role(Enum):
    """What a part of a line is; the value is the SGR code by which a terminal shows it."""

    PLAIN = ""
    QUIET = "2"
    TRANSACTION = "36"
    TIMES = "33"
    ERROR = "31"

    def paint(self, text: str) -> str:
        """Give a text as a terminal shows it in this role."""
        return f"\x1b[{self.value}m{text}\x1b[0m" if self.value and text.strip() else text


def plain(lines: Iterable[Line]) -> str:
    """Give lines as text."""
    return "\n".join("".join(text for _, text in line).rstrip() for line in lines)


def coloured(lines: Iterable[Line]) -> str:
    """Give lines as a terminal shows them in colours; without these it is the plain text."""
    return "\n".join("".join(role.paint(text) for role, text in line).rstrip() for line in lines)


def visible(text: str) -> str:
    """Give a text of one line, with an escape in place of each character that is not shown."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def cut(text: str, room: int) -> str:
    """Give a text that is no longer than so many columns."""
    return text if len(text) <= room else f"{text[: room - 1]}…"


def cut_line(line: Line, room: int) -> Line:
    """Give a line that has exactly so many columns: cut, or filled with blanks."""
    length = sum(len(text) for _, text in line)
    if length <= room:
        return [*line, (Role.PLAIN, " " * (room - length))]
    found: list[tuple[Role, str]] = []
    left = room - 1
    for role, text in line:
        found.append((role, text[:left]))
        left -= len(found[-1][1])
    return [*found, (Role.PLAIN, "…")]
