"""PostgreSQL's wire protocol, as far as the gateway speaks it; pure, no socket is touched.

A message is kept as it stands on the wire, with its type byte and length: what is only passed on is
never taken apart.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_INT: Final = Struct("!I")
_HEADER: Final = Struct("!cI")
_START: Final = Struct("!II")

PROTOCOL_3_0: Final = 0x0003_0000
NEWEST_MINOR: Final = 2
CANCEL: Final = 80877102
SSL: Final = 80877103
GSSENC: Final = 80877104

# Those of the server itself.
_LARGE: Final = 0x3FFF_FFFF
_SMALL: Final = 10_000
_LIMITS: Final = {
    **dict.fromkeys(b"QPBdF", _LARGE),
    **dict.fromkeys(b"EDCHScfXp", _SMALL),
}
_MOST_STARTUP: Final = 10_000


class ProtocolViolation(Exception):  # noqa: N818 - PostgreSQL's name of it
    """What came is not the protocol, or more than it allows; the message says what."""


class Message(NamedTuple):
    """A message of a client; `raw` is all of it."""

    kind: int
    raw: bytes


def size_of(header: bytes) -> int:
    """Give the length of a client's whole message from its first five bytes."""
    kind, length = header[0], _INT.unpack_from(header, 1)[0]
    most = _LIMITS.get(kind)
    if most is None:
        raise ProtocolViolation(f"invalid frontend message type {kind}")
    if not 4 <= length <= most:
        raise ProtocolViolation("invalid message length")
    return int(length) + 1


# Start-up


class Startup(NamedTuple):
    """The first message of a client: what it wants, and with which parameters."""

    code: int
    parameters: dict[str, str]
    unknown_options: tuple[str, ...] = ()
    """Protocol options, which are not known here."""


def startup_size(header: bytes) -> int:
    """Give the length of a first message from its first four bytes."""
    size = int(_INT.unpack_from(header)[0])
    if not 8 <= size <= _MOST_STARTUP:
        raise ProtocolViolation("invalid length of startup packet")
    return size


def password_size(header: bytes) -> int:
    """Give what follows the five bytes with which a password begins."""
    size = int(_INT.unpack_from(header, 1)[0])
    if not 5 <= size <= _MOST_STARTUP:
        raise ProtocolViolation("invalid length of password packet")
    return size - 4


def read_startup(raw: bytes) -> Startup:
    """Read a first message."""
    code = _START.unpack_from(raw)[1]
    if code in (SSL, GSSENC, CANCEL):
        return Startup(code, {})
    if code >> 16 != PROTOCOL_3_0 >> 16:
        raise ProtocolViolation(
            f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}: "
            f"server supports 3.0 to 3.{NEWEST_MINOR}"
        )
    words = raw[8:].split(b"\0")
    if words[-2:] != [b"", b""]:
        raise ProtocolViolation("invalid startup packet layout: expected terminator as last byte")
    del words[-2:]
    if len(words) % 2:
        raise ProtocolViolation("invalid startup packet layout: a value is missing")
    try:
        pairs = [word.decode() for word in words]
    except UnicodeDecodeError as error:
        raise ProtocolViolation("invalid startup packet: it is not in UTF-8") from error
    parameters = dict(zip(pairs[::2], pairs[1::2], strict=True))
    unknown = tuple(name for name in parameters if name.startswith("_pq_."))
    for name in unknown:
        del parameters[name]
    return Startup(code, parameters, unknown)


# What a client sends


def cstring(raw: bytes, start: int) -> tuple[bytes, int]:
    """Give a string and where what follows it begins."""
    end = raw.find(b"\0", start)
    if end < 0:
        raise ProtocolViolation("invalid string in message")
    return raw[start:end], end + 1


class Parse(NamedTuple):
    """A statement to prepare; `types` is the rest of the message."""

    name: bytes
    query: bytes
    types: bytes

    @classmethod
    def read(cls, raw: bytes) -> Parse:
        """Take a message apart."""
        name, at = cstring(raw, 5)
        query, at = cstring(raw, at)
        return cls(name, query, raw[at:])

    def renamed(self, name: bytes) -> bytes:
        """Give the message with another name."""
        return message(b"P", name + b"\0" + self.query + b"\0" + self.types)


class Bind(NamedTuple):
    """A portal to make of a statement; `rest` is what follows their names."""

    portal: bytes
    statement: bytes
    rest: bytes

    @classmethod
    def read(cls, raw: bytes) -> Bind:
        """Take a message apart."""
        portal, at = cstring(raw, 5)
        statement, at = cstring(raw, at)
        return cls(portal, statement, raw[at:])

    def of(self, statement: bytes) -> bytes:
        """Give the message for a statement of another name."""
        return message(b"B", self.portal + b"\0" + statement + b"\0" + self.rest)

    def texts(self) -> list[str | None]:
        """Give the parameters that are text or boolean; raises ProtocolViolation."""
        try:
            return self._texts()
        except (IndexError, ValueError) as error:
            raise ProtocolViolation("invalid Bind message") from error

    def _texts(self) -> list[str | None]:
        rest, count = self.rest, _short(self.rest, 0)
        formats, at = [_short(rest, 2 + 2 * i) for i in range(count)], 2 + 2 * count
        found: list[str | None] = []
        number, at = _short(rest, at), at + 2
        for i in range(number):
            length, at = int.from_bytes(rest[at : at + 4], "big", signed=True), at + 4
            value = rest[at : at + max(0, length)]
            at += max(0, length)
            kind = formats[i] if len(formats) > 1 else formats[0] if formats else 0
            found.append(None if length < 0 else _as_text(value, binary=bool(kind)))
        return found


def _as_text(value: bytes, *, binary: bool) -> str:
    if binary and value in (b"\0", b"\1"):
        return "f" if value == b"\0" else "t"
    return value.decode(errors="replace")


def _short(raw: bytes, at: int) -> int:
    return raw[at] << 8 | raw[at + 1]


def target(raw: bytes) -> tuple[int, bytes]:
    """Give what a Describe or Close names: its kind (S or P) and name."""
    if len(raw) < 7:
        raise ProtocolViolation("invalid message format")
    return raw[5], cstring(raw, 6)[0]


def about(kind: bytes, what: bytes, name: bytes) -> bytes:
    """Give a Describe (D) or Close (C) of a statement (S) or portal (P)."""
    return message(kind, what + name + b"\0")


# What a server sends


def message(kind: bytes, body: bytes = b"") -> bytes:
    """Give a message."""
    return _HEADER.pack(kind, len(body) + 4) + body


SYNC: Final = message(b"S")
FLUSH: Final = message(b"H")
AUTHENTICATION_OK: Final = message(b"R", _INT.pack(0))
CLEARTEXT_PASSWORD: Final = message(b"R", _INT.pack(3))
PARSE_COMPLETE: Final = message(b"1")
BIND_COMPLETE: Final = message(b"2")
CLOSE_COMPLETE: Final = message(b"3")
NO_DATA: Final = message(b"n")
NO_PARAMETERS: Final = message(b"t", b"\0\0")
EMPTY_QUERY: Final = message(b"I")
READY: Final = {status: message(b"Z", bytes([status])) for status in b"ITE"}


def query(text: bytes) -> bytes:
    """Give a simple query."""
    return message(b"Q", text + b"\0")


def complete(tag: bytes) -> bytes:
    """Give a CommandComplete."""
    return message(b"C", tag + b"\0")


def parameter_status(name: str, value: str) -> bytes:
    """Give a ParameterStatus."""
    return message(b"S", f"{name}\0{value}\0".encode())


def read_parameter_status(raw: bytes) -> tuple[str, str]:
    """Give name and value of a ParameterStatus."""
    name, value = raw[5:-1].split(b"\0")
    return name.decode(), value.decode(errors="replace")


def key_data(pid: int, key: bytes) -> bytes:
    """Give a BackendKeyData."""
    return message(b"K", _INT.pack(pid & 0xFFFF_FFFF) + key)  # a pooler's may be negative


def negotiated(minor: int, unknown: Iterable[str]) -> bytes:
    """Give a NegotiateProtocolVersion with the minor version that will be spoken."""
    names = [name.encode() + b"\0" for name in unknown]
    return message(b"v", _INT.pack(PROTOCOL_3_0 + minor) + _INT.pack(len(names)) + b"".join(names))


# Errors and notices


def fields_of(raw: bytes) -> dict[str, bytes]:
    """Give the fields of an ErrorResponse or NoticeResponse by their letters."""
    return {chr(field[0]): field[1:] for field in raw[5:].split(b"\0") if field}


def report(kind: bytes, fields: Mapping[str, bytes]) -> bytes:
    """Give an ErrorResponse (E) or NoticeResponse (N) with these fields."""
    body = b"".join(letter.encode() + value + b"\0" for letter, value in fields.items())
    return message(kind, body + b"\0")


def failure(sqlstate: str, text: str, severity: str = "ERROR", hint: str = "") -> bytes:
    """Give an ErrorResponse of our own."""
    return _own(b"E", severity, sqlstate, text, hint)


def notice(sqlstate: str, text: str, severity: str = "WARNING") -> bytes:
    """Give a NoticeResponse of our own."""
    return _own(b"N", severity, sqlstate, text, "")


def _own(kind: bytes, severity: str, sqlstate: str, text: str, hint: str) -> bytes:
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": text}
    if hint:
        fields["H"] = hint
    return report(kind, {letter: value.encode() for letter, value in fields.items()})


# What comes from a server, piece by piece


class Answers:
    """Takes a server's bytes as they come and gives whole messages.

    Runs of messages of which the gateway only counts the bytes come as one piece.
    """

    def __init__(self, passed_on: bytes) -> None:
        self._passed_on: Final = frozenset(passed_on)
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Give what is complete: a run of messages to pass on, or one message of another type."""
        if self._rest:
            data = self._rest + data
        found: list[bytes] = []
        at = run = 0
        end, passed_on, length_at = len(data), self._passed_on, _INT.unpack_from
        while end - at >= 5:
            after = at + 1 + length_at(data, at + 1)[0]
            if after > end:
                break
            if data[at] not in passed_on:
                if run < at:
                    found.append(data[run:at])
                found.append(data[at:after])
                run = after
            at = after
        if run < at:
            found.append(data[run:at])
        self._rest = data[at:]
        return found
