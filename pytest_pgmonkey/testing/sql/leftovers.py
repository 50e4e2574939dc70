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

    __slots__ = ("_floor", "_savepoints", "_used_savepoints", "may_be_there")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.may_be_there = False
        self._used_savepoints = False
        self._floor = 0
        # Those that stand, each with whether anything was left when it was made.
        self._savepoints: list[tuple[str, bool]] = []

    def can_go_on(self, *, is_carried: bool) -> bool:
        """Whether nothing is lost if the transaction goes on elsewhere.

        One that has only read does not, unless it came from elsewhere itself.
        """
        is_nothing = not (self.may_be_there or self._savepoints)
        return is_nothing and (self._used_savepoints or is_carried)

    def protect(self) -> None:
        """Take the savepoints that stand for somebody else's from now on."""
        self._floor = len(self._savepoints)

    def is_inside(self, part: Statement) -> bool:
        """Whether a command for a savepoint leaves alone those that are protected."""
        return part.words[0] == "SAVEPOINT" or self._depth_of(part) >= self._floor

    def _depth_of(self, part: Statement) -> int:
        """Give how many savepoints stand below the one that a statement names, else all."""
        name = _name(part)
        for index in range(len(self._savepoints) - 1, -1, -1):
            if self._savepoints[index][0] == name:
                return index
        return len(self._savepoints)

    def note(self, part: Statement) -> None:
        """Take note of a statement that may do more than read."""
        if part.verb is not Verb.SAVEPOINT:
            self.may_be_there = True
            return
        self._used_savepoints = True
        if part.words[0] == "SAVEPOINT":
            self._savepoints.append((_name(part), self.may_be_there))
            return
        index = self._depth_of(part)
        if part.words[0] != "RELEASE" and index < len(self._savepoints):
            self.may_be_there = self._savepoints[index][1]
            index += 1
        del self._savepoints[index:]


def _name(part: Statement) -> str:
    last = part.text.split()[-1]
    return last.strip('"') if last.startswith('"') else last.lower()
