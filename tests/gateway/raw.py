"""A tiny client of PostgreSQL's protocol, which says what no driver would say."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

from helpers.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Mapping

SSL = struct.pack("!II", 8, 80877103)
GSSENC = struct.pack("!II", 8, 80877104)
_OWN_TYPES = 16384  # the first OID that is not PostgreSQL's own
_SHOWN = "SVCMDPn"  # of errors and notices


def message(kind: str, body: bytes = b"") -> bytes:
    return kind.encode() + struct.pack("!I", len(body) + 4) + body


def startup(code: int, parameters: Mapping[str, str]) -> bytes:
    words = b"".join(f"{k}\0{v}\0".encode() for k, v in parameters.items())
    return struct.pack("!II", len(words) + 9, code) + words + b"\0"


def query(text: str) -> bytes:
    return message("Q", text.encode() + b"\0")


def parse(text: str, name: str = "", types: tuple[int, ...] = ()) -> bytes:
    oids = struct.pack(f"!H{len(types)}I", len(types), *types)
    return message("P", f"{name}\0{text}\0".encode() + oids)


def bind(*values: str | None, portal: str = "", name: str = "") -> bytes:
    body = f"{portal}\0{name}\0".encode() + struct.pack("!HH", 0, len(values))
    for value in values:
        raw = (value or "").encode()
        body += struct.pack("!i", -1 if value is None else len(raw)) + raw
    return message("B", body + struct.pack("!H", 0))


def describe(kind: str = "P", name: str = "") -> bytes:
    return message("D", f"{kind}{name}\0".encode())


def execute(portal: str = "", limit: int = 0) -> bytes:
    return message("E", portal.encode() + b"\0" + struct.pack("!I", limit))


def close(kind: str, name: str = "") -> bytes:
    return message("C", f"{kind}{name}\0".encode())


def call(oid: int, *values: bytes) -> bytes:
    body = struct.pack("!IHHH", oid, 1, 1, len(values))
    for value in values:
        body += struct.pack("!I", len(value)) + value
    return message("F", body + struct.pack("!H", 1))


def run(text: str, *values: str | None) -> bytes:
    """Parse, bind, describe and execute."""
    return parse(text) + bind(*values) + describe() + execute()


SYNC, FLUSH, TERMINATE = message("S"), message("H"), message("X")
COPY_DONE = message("c")


def copy_data(text: str) -> bytes:
    return message("d", text.encode())


class RawClient:
    """A socket that speaks messages; `conninfo` says where it leads."""

    def __init__(self, conninfo: Mapping[str, str]) -> None:
        self.conninfo = conninfo
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.path = f"{conninfo['host']}/.s.PGSQL.{conninfo['port']}"
        self.sock.connect(self.path)
        self.pid = 0
        self.key = b""

    def close(self) -> None:
        self.sock.close()

    def send(self, *data: bytes) -> None:
        self.sock.sendall(b"".join(data))

    def exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            data = self.sock.recv(size - len(found))
            if not data:
                raise EOFError
            found += data
        return found

    def read(self) -> Any:
        """Give the next message, taken apart as far as it is equal on another server."""
        header = self.exactly(5)
        kind = chr(header[0])
        body = self.exactly(struct.unpack("!I", header[1:])[0] - 4)
        if kind == "K":
            self.pid, self.key = struct.unpack_from("!I", body)[0], body[4:]
        return kind, _shown(kind, body)

    def until(self, kinds: str = "Z") -> list[Any]:
        """Give the messages up to one of these kinds; where the socket ends, "end" is last."""
        found: list[Any] = []
        try:
            while not found or found[-1][0] not in kinds:
                found.append(self.read())
        except (EOFError, ConnectionResetError):
            found.append("end")
        return found

    def ask(self, *data: bytes) -> list[Any]:
        self.send(*data)
        return self.until()

    def start(self, minor: int = 0, **parameters: str) -> list[Any]:
        """Send the first message and give what is answered."""
        who = {"user": self.conninfo["user"], "database": self.conninfo["dbname"]}
        self.send(startup(3 << 16 | minor, {**who, **parameters}))
        return self.until()

    def cancel(self, key: bytes | None = None) -> None:
        """Ask, with a connection of its own, for the end of what this client runs."""
        other = RawClient(self.conninfo)
        key = self.key if key is None else key
        other.send(struct.pack("!III", 12 + len(key), 80877102, self.pid) + key)
        assert other.sock.recv(1) == b""
        other.close()


def _shown(kind: str, body: bytes) -> Any:
    if kind in "EN":
        fields = {chr(field[0]): field[1:].decode() for field in body.split(b"\0") if field}
        return {letter: fields[letter] for letter in _SHOWN if letter in fields}
    if kind in "CS":
        return tuple(body[:-1].decode().split("\0"))
    if kind == "K":
        return len(body) - 4
    if kind == "T":
        return _columns(body)
    if kind == "t":
        oids = struct.unpack(f"!{(len(body) - 2) // 4}I", body[2:])
        return [_type(oid) for oid in oids]
    if kind == "D":
        return _values(body)
    return body


def _type(oid: int) -> Any:
    return oid if oid < _OWN_TYPES else "own"


def _columns(body: bytes) -> list[Any]:
    found, at = [], 2
    for _ in range(struct.unpack_from("!H", body)[0]):
        end = body.index(b"\0", at)
        table, number, oid, size, modifier, shape = struct.unpack_from("!IhIhih", body, end + 1)
        found.append((body[at:end], bool(table), number, _type(oid), size, modifier, shape))
        at = end + 19
    return found


def _values(body: bytes) -> list[bytes | None]:
    found: list[bytes | None] = []
    at = 2
    for _ in range(struct.unpack_from("!H", body)[0]):
        (size,) = struct.unpack_from("!i", body, at)
        at += 4
        found.append(None if size < 0 else body[at : at + size])
        at += max(0, size)
    return found
