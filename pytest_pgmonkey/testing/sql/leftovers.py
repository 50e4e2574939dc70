"""What is left of a transaction's work, as far as its statements tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lexer import Verb

if TYPE_CHECKING:
    from .lexer import Statement

__all__ = ["Leftovers"]


class Leftovers:
    """What of a transaction would be lost with it, as far as its statements tell.

    A framework for tests may keep one open over many tests, and undo each by a savepoint.
    """

    __slots__ = ("_savepoints", "may_be_there", "used_savepoints")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.may_be_there = False
        self.used_savepoints = False
        # Those that stand, each with whether anything was left when it was made.
        self._savepoints: list[tuple[str, bool]] = []

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is left, and no savepoint stands."""
        return not (self.may_be_there or self._savepoints)

    def note(self, part: Statement) -> None:
        """Take note of a statement that may do more than read."""
        if part.verb is not Verb.SAVEPOINT:
            self.may_be_there = True
            return
        self.used_savepoints = True
        last = part.text.split()[-1]
        name = last.strip('"') if last.startswith('"') else last.lower()
        if part.words[0] == "SAVEPOINT":
            self._savepoints.append((name, self.may_be_there))
            return
        names = [each for each, _ in self._savepoints]
        if name not in names:
            return
        index = len(names) - 1 - names[::-1].index(name)
        if part.words[0] != "RELEASE":
            self.may_be_there = self._savepoints[index][1]
            index += 1
        del self._savepoints[index:]
