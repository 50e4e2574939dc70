"""The statements that a client has prepared, and where each of them is prepared just now.

Sessions on the server come and go beneath a client, or are shared with others. So each is kept as
the client sent it, and prepared where the client uses it next: in a shared session under a name
that nobody else uses.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Final

from ...sandbox.core.statements import CONTROL
from ...sql.lexer import statements
from .wire import fields_of, report

if TYPE_CHECKING:
    from ...sql.lexer import Statement
    from .wire import Parse

_numbers: Final = count(1)
_OURS: Final = b"_pgmonkey_"


class ClientStatement:
    """One of them; `parts` is more than one statement only where the server will refuse it."""

    __slots__ = ("home", "is_control", "is_plain", "name", "parse", "parts")

    def __init__(self, parse: Parse) -> None:
        self.parse: Final = parse
        text = parse.query.decode(errors="surrogateescape")
        self.parts: Final[tuple[Statement, ...]] = statements(text)
        alone = len(self.parts) == 1
        self.is_control: Final = alone and (
            self.parts[0].verb in CONTROL or self.parts[0].words == ("DISCARD", "ALL")
        )
        """Whether the sandbox runs something in its place: it begins or ends a transaction."""
        self.is_plain: Final = all(part.plain for part in self.parts)
        self.home: object = None
        """The session that it is prepared in."""
        self.name = b""
        """Its name there."""

    def settle(self, home: object, *, shared: bool) -> bytes:
        """Give the message that prepares it in a session, which may be shared with others."""
        self.home = home
        self.name = self.parse.name
        if self.name and shared:
            self.name = b"%s%d_" % (_OURS, next(_numbers))
        return self.parse.renamed(self.name)


class ClientStatements:
    """All of a client's, by the names that it has given them."""

    def __init__(self) -> None:
        self._found: dict[bytes, ClientStatement] = {}

    def get(self, name: bytes) -> ClientStatement | None:
        """Give the one of that name."""
        return self._found.get(name)

    def add(self, statement: ClientStatement) -> None:
        """Keep one; the unnamed one takes the place of another."""
        self._found[statement.parse.name] = statement

    def remove(self, name: bytes) -> ClientStatement | None:
        """Forget one, and give it."""
        return self._found.pop(name, None)

    def clear(self) -> None:
        """Forget all."""
        self._found.clear()

    def prepared_in(self, home: object) -> bool:
        """Whether a session knows any by name."""
        return any(each.home is home and each.name for each in self._found.values())

    def as_named(self, raw: bytes) -> bytes:
        """Give an ErrorResponse with the client's names in place of ours."""
        if _OURS not in raw:
            return raw
        fields = fields_of(raw)
        for each in self._found.values():
            if each.name:
                fields = {k: v.replace(each.name, each.parse.name) for k, v in fields.items()}
        return report(b"E", fields)

    def unsettle(self) -> None:
        """Note that no session knows any of them any more."""
        for statement in self._found.values():
            statement.home = None
