"""One client of the gateway: its socket, and what of it outlives a test."""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from ...addresses.purpose import Purpose
from ...sandbox.core.places import Peer
from . import wire
from .wire import Message, ProtocolViolation

if TYPE_CHECKING:
    from .client_statements import ClientStatements

_CHUNK: Final = 65536
_PATIENCE: Final = 30  # seconds for a client that takes nothing of what it asked for
_STALLS: Final = 0.2  # seconds after which it takes nothing, at the end of a test
_MOMENT: Final = 0.001
_HANDSHAKE: Final = 10.0  # seconds for its first message


class Client:
    """Reads a client's messages and sends it what it asked for.

    Where it is gone, or takes nothing any more, it is `dead`, and what is sent goes nowhere.
    """

    def __init__(self, sock: socket.socket, statements: ClientStatements, purpose: Purpose) -> None:
        self._socket: Final = sock
        self.ends_with_test: Final = purpose is not Purpose.SESSION
        """Whether it is sent away with the running test."""
        self.only_looks: Final = purpose is Purpose.PEEK
        """Whether it may write nothing, in whatever test."""
        self.has_password: Final = sock.family != socket.AF_UNIX
        """Whether it must say the password: who uses a Unix socket is known to be the user."""
        self._data = b""
        self._at = 0
        self._deadline = 0.0
        self._put_back: deque[Message] = deque()
        self.out = bytearray()
        """What is to be sent with the next flush."""
        self.statements: Final = statements
        self.parameters: dict[str, str] = {}
        """What it has said when it connected."""
        self.settings: tuple[tuple[str, str], ...] = ()
        """What of it is a setting of its session."""
        self.kept: dict[str, str] = {}
        """The session settings that its statements have left, as values."""
        self.reported: dict[str, str] = {}
        """What it was told last of the settings that a server reports."""
        self.origin = Peer("", 0)
        self.key = b""
        self.names_itself = False
        """Whether it has asked for its application's name."""
        self.status = ord("I")
        """The transaction status that it was told last."""
        self.tag = b""
        """The last CommandComplete that it was sent, or is about to be."""
        self.skips = False
        """Whether everything up to its next Sync is to be skipped."""
        self.begun = b""
        """The BEGIN of a transaction that goes on in its next session."""
        self.widens = False
        """Whether that transaction writes, outside of a test."""
        self.doomed = False
        """Whether it is in a transaction that has ended with its test."""
        self.dead = False
        self.dismissed = ""
        """Why it is to be told to go."""
        self.sending = False
        """Whether it has yet to take what it is sent."""

    @property
    def in_block(self) -> bool:
        """Whether it was told last that it is in a transaction block."""
        return self.status != ord("I")

    def fileno(self) -> int:
        """Give the socket's number, to wait for it."""
        return self._socket.fileno()

    # What it sends

    def startup(self) -> bytes:
        """Give its first message; raises ProtocolViolation, TimeoutError or EOFError."""
        self._deadline = time.monotonic() + _HANDSHAKE
        header = self._exactly(4)
        return header + self._exactly(wire.startup_size(header) - 4)

    def password(self) -> bytes:
        """Give the password that it was asked for; raises what `startup` does."""
        header = self._exactly(5)
        if header[:1] != b"p":
            raise ProtocolViolation("a password was expected")
        return self._exactly(wire.password_size(header)).removesuffix(b"\0")

    def has_come(self) -> None:
        """Have no time limit for what it asks from now on, but one for what it takes."""
        # The kernel's own limit: a time-out of Python's costs a poll for each call.
        self._socket.settimeout(None)
        limit = struct.pack("@ll", _PATIENCE, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            self._socket.settimeout(max(_MOMENT, self._deadline - time.monotonic()))
            data = self._socket.recv(size - len(found))
            if not data:
                raise EOFError
            found += data
        return found

    def put_back(self, *messages: Message) -> None:
        """Let the next calls of `receive()` give these messages."""
        self._put_back.extendleft(reversed(messages))

    def receive(self) -> Message | None:
        """Wait for a message and give it; `None` where no other will come."""
        if self._put_back:
            return self._put_back.popleft()
        try:
            while (message := self.next_message()) is None:
                if not self.read():
                    return None
        except OSError:
            return None
        return message

    def taken(self) -> Message | None:
        """Give a message without waiting for one."""
        return self._put_back.popleft() if self._put_back else self.next_message()

    def next_message(self) -> Message | None:
        """Give a message that has been read whole; raises ProtocolViolation."""
        data, at = self._data, self._at
        if len(data) - at < 5:
            return None
        header = data[at : at + 5]
        after = at + wire.size_of(header)
        if len(data) < after:
            return None
        self._at = after
        raw = data if at == 0 and after == len(data) else data[at:after]
        return Message(data[at], raw)

    def read(self) -> bool:
        """Read what there is; gives whether the client has not hung up."""
        data = self._socket.recv(max(_CHUNK, self._missing()))
        self._data = self._data[self._at :] + data
        self._at = 0
        return bool(data)

    def _missing(self) -> int:
        """Give how much of a long message has not been read; not all of it need ever come."""
        have = len(self._data) - self._at
        if have < 5:
            return 0
        return min(wire.size_of(self._data[self._at : self._at + 5]) - have, have, 1 << 24)

    def read_waiting(self) -> bool:
        """Read what can be read without waiting; gives whether the client is still there."""
        try:
            return self.read()
        except OSError:
            return False

    # What it is sent

    def flush(self) -> None:
        """Send what is to be sent."""
        out, self.out = self.out, bytearray()
        if self.dead or not out:
            return
        self.sending = True
        try:
            self._socket.sendall(out)
        except OSError:
            self.dead = True
        self.sending = False

    def report(self, name: str, value: str) -> bytes:
        """Give the message that tells it of a setting."""
        self.reported[name] = value
        return wire.parameter_status(name, value)

    def note_report(self, raw: bytes) -> None:
        """Note what a ParameterStatus of the server's tells it."""
        self.reported.update([wire.read_parameter_status(raw)])

    def tell_ready(self, status: int) -> None:
        """Tell it that it may go on, with the status of its transaction."""
        self.status = status
        self.out += wire.READY[status]
        self.flush()

    def refuse(self, violation: ProtocolViolation) -> None:
        """End it for what it has sent."""
        self.out += wire.failure("08P01", str(violation), "FATAL")
        self.flush()

    # Its end

    def hang_up(self) -> None:
        """Wake whoever waits for it, from another thread: nothing more comes."""
        try:
            self._socket.shutdown(socket.SHUT_RD)
        except OSError:
            self.dead = True

    def cut_off(self) -> None:
        """Wake whoever sends to it in vain, from another thread."""
        deadline = time.monotonic() + _STALLS
        while self.sending and time.monotonic() < deadline:
            time.sleep(_MOMENT)
        if not self.sending:
            return
        self.dead = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def drop(self) -> None:
        """Close the socket of a client that is another process's."""
        self.dead = True
        self._socket.close()

    def close(self) -> None:
        """Close the socket; what was sent reaches the client, which may still be sending."""
        if self.dismissed and not self.dead:
            self.out += wire.failure("57P01", self.dismissed, "FATAL")
        self.flush()
        self._linger()
        self._socket.close()

    def _linger(self) -> None:
        """Read what has come, or the socket's end would take what was sent with it."""
        deadline = time.monotonic() + 0.1
        try:
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.setblocking(False)
            while time.monotonic() < deadline and self._socket.recv(_CHUNK):
                pass
        except OSError:
            return

    def identify(self, process: int) -> None:
        """Note who it is, for messages."""
        name = self.parameters.get("application_name", "")
        port = self._socket.getpeername()[1] if self.has_password else 0
        self.origin = Peer(name, process, port)


def peer_process(sock: socket.socket) -> int:
    """Give the process at the other end of a Unix socket, 0 where that cannot be told."""
    option: Any = getattr(socket, "SO_PEERCRED", None)
    if option is None or sock.family != socket.AF_UNIX:
        return 0
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, option, 12)[:4], "little")
