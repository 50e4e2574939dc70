"""The gateway's porter: accepts clients in a process of its own and hands them to pytest.

libpq's PQcancel waits until its connection is closed. A client in the pytest process may hold
the GIL meanwhile, so that no thread there could accept the connection and close it.

Like every guardian it imports little: the gateway's start waits for it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from ...servers import guardian
from ..protocol.wire import CANCEL as CANCEL_REQUEST
from ..protocol.wire import GSSENC as GSSENC_REQUEST
from ..protocol.wire import SSL as SSL_REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable

# pathlib would make this process start 10 ms later
# ruff: noqa: PTH102, PTH106, PTH108, PTH208

#: Clients that live on from test to test, those that end with theirs, and those that only look.
PORTS: Final = (5432, 5433, 5434)
#: So many of them may come by TCP as well.
BY_TCP: Final = 2
LOOPBACK: Final = "127.0.0.1"
SOCKET: Final = ".s.PGSQL."
CONTROL: Final = "porter"

# Messages to pytest: kind, number, process id, and the length of the key that follows.
HEADER: Final = struct.Struct("!cIiH")
CLIENT: Final = b"S"  # comes with the client's socket
CANCEL: Final = b"C"
# The answer: the number of a message.
ACKNOWLEDGEMENT: Final = struct.Struct("!I")

REQUEST: Final = struct.Struct("!II")  # length and code
CANCEL_HEAD: Final = struct.Struct("!IIi")  # with the process id
LONGEST_KEY: Final = 256  # in protocol 3.2

# What a client is by its first bytes.
SILENT: Final = "silent"
GONE: Final = "gone"
INCOMPLETE: Final = "incomplete"
ENCRYPTION: Final = "encryption"
SESSION: Final = "session"
INCOMPLETE_CANCEL: Final = "incomplete cancel"
COMPLETE_CANCEL: Final = "complete cancel"
BROKEN_CANCEL: Final = "broken cancel"

BACKLOG: Final = 128
#: So many clients may be undecided, and as many may wait for pytest; further ones are closed, as
#: a server would refuse them. A process can open 256 files on macOS.
LIMIT: Final = 100
LOOK_AGAIN: Final = 0.02
CANCEL_PATIENCE: Final = 0.05
NEVER: Final = float("inf")


class Guardian(guardian.Guardian):
    """The porter's process: its directory and sockets live as long as pytest wants them."""

    def __init__(self, parent: str, directory: str, patience: str) -> None:
        super().__init__(parent)
        self._directory = directory
        self._patience = float(patience)
        self._made = False
        self._porter: Porter | None = None
        os.umask(0o077)

    def do_make(self) -> None:
        """Make the directory, and listen in it for pytest and for clients."""
        with self._lock:
            if self._ended:
                raise OSError("it is being stopped")
            os.mkdir(self._directory, 0o700)
            self._made = True
            self._porter = Porter(self._directory, self._patience)
            self._porter.start()

    def do_listen_by_tcp(self) -> list[int]:
        """Listen on loopback as well; gives a port for each kind of client."""
        with self._lock:
            if self._ended or self._porter is None:
                raise OSError("it is being stopped")
            return self._porter.listen_by_tcp()

    def is_kept(self) -> bool:
        return False

    def clean_up(self) -> None:
        if self._porter is not None:
            self._porter.stop()
        if self._made:
            remove_directory(self._directory)


class Undecided:
    """A client that has not yet said what it wants."""

    __slots__ = ("deadline", "look_at", "refused")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.look_at = NEVER
        self.refused: set[int] = set()


class Porter(threading.Thread):
    """Decides on each client by its first bytes; no client can keep it from the others.

    A client whose first bytes are incomplete after `patience` seconds is handed over as it is.
    """

    def __init__(self, directory: str, patience: float) -> None:
        super().__init__(daemon=True)
        self._patience = patience
        self._control_path = f"{directory}/{CONTROL}"
        self._listeners = [listen(f"{directory}/{SOCKET}{port}") for port in PORTS]
        self._watched = 0  # so many of them
        self._control = listen(self._control_path)
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._running = True
        self._undecided: dict[socket.socket, Undecided] = {}
        self._number = 0
        # Messages that are to be written: number, bytes, file descriptors.
        self._outgoing: deque[tuple[int, bytes, list[int]]] = deque()
        # Clients of messages that pytest has not acknowledged, and until when they are held.
        self._held: dict[int, tuple[socket.socket, float]] = {}
        self._acknowledged = bytearray()

    def listen_by_tcp(self) -> list[int]:
        """Listen on loopback as well, from another thread; gives the ports."""
        listeners = [listen_by_tcp() for _ in range(BY_TCP)]
        self._listeners.extend(listeners)
        self._waker.send(b"\0")
        return [int(listener.getsockname()[1]) for listener in listeners]

    def stop(self) -> None:
        """Close all sockets, and wait for that."""
        self._waker.close()
        self.join()

    def run(self) -> None:
        self._watch(self._woken, self._wake)
        self._watch(self._control, self._accept_control)
        try:
            while self._running:
                for key, _ in self._selector.select(self._time_left()):
                    key.data(key.fileobj)
                self._look_at_clock()
        finally:  # also after an error: clients are refused then, and pytest is told
            self._close_all()

    def _watch(self, sock: socket.socket, action: Callable[[socket.socket], object]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, action)

    def _wake(self, sock: socket.socket) -> None:
        self._running = bool(sock.recv(64))
        if self._watched:  # else pytest has not come yet
            self._watch_listeners()

    def _watch_listeners(self) -> None:
        for listener in self._listeners[self._watched :]:
            self._watch(listener, self._accept_client)
            self._watched += 1

    def _close_all(self) -> None:
        self._selector.close()
        held = [sock for sock, _ in self._held.values()]
        for sock in (*self._listeners, self._control, self._woken, *self._undecided, *held):
            sock.close()

    # --- the clock ---

    def _time_left(self) -> float | None:
        times = [min(client.deadline, client.look_at) for client in self._undecided.values()]
        times += [until for _, until in self._held.values()]
        soonest = min(times, default=NEVER)
        return None if soonest == NEVER else max(0.0, soonest - time.monotonic())

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        for sock, client in list(self._undecided.items()):
            if now >= client.deadline:
                self._decide(sock, now=True)
            elif now >= client.look_at:
                client.look_at = NEVER
                self._watch(sock, self._decide)
                self._decide(sock)
        for number, (_, until) in list(self._held.items()):
            if now >= until:
                self._release(number)

    # --- clients ---

    def _accept_client(self, listener: socket.socket) -> None:
        sock = accept(listener)
        if sock is None:
            return
        while len(self._undecided) >= LIMIT:
            self._decide(next(iter(self._undecided)), now=True)
        self._undecided[sock] = Undecided(time.monotonic() + self._patience)
        self._watch(sock, self._decide)

    def _decide(self, sock: socket.socket, *, now: bool = False) -> None:
        """Act on a client's first bytes; with `now` also where they are incomplete."""
        if sock not in self._undecided:  # it was decided earlier in this turn
            return
        first = receive(sock, CANCEL_HEAD.size + LONGEST_KEY, socket.MSG_PEEK)
        kind = classify(first)
        if kind in (GONE, BROKEN_CANCEL) or (now and kind == INCOMPLETE_CANCEL):
            self._take(sock).close()
        elif first and kind == ENCRYPTION:
            self._refuse_encryption(sock, first)
        elif first and kind == COMPLETE_CANCEL:
            self._pass_on_cancel(sock, first)
        elif now or kind == SESSION:
            self._hand_over(sock)
        elif kind != SILENT:
            self._look_later(sock)

    def _take(self, sock: socket.socket) -> socket.socket:
        if self._undecided.pop(sock).look_at == NEVER:
            self._selector.unregister(sock)
        return sock

    def _look_later(self, sock: socket.socket) -> None:
        """Look again after a moment; bytes left unread would make the selector return at once."""
        self._selector.unregister(sock)
        self._undecided[sock].look_at = time.monotonic() + LOOK_AGAIN

    def _refuse_encryption(self, sock: socket.socket, first: bytes) -> None:
        client = self._undecided[sock]
        length, code = REQUEST.unpack_from(first)
        if code in client.refused:  # as with a server, each may be asked for once
            self._hand_over(sock)
            return
        client.refused.add(code)
        client.deadline = time.monotonic() + self._patience
        try:
            sock.recv(length)
            sock.send(b"N")
        except OSError:
            self._take(sock).close()

    def _hand_over(self, sock: socket.socket) -> None:
        self._take(sock)
        self._tell(sock, CLIENT, fds=[sock.fileno()])

    def _pass_on_cancel(self, sock: socket.socket, first: bytes) -> None:
        length, _, pid = CANCEL_HEAD.unpack_from(first)
        # A socket that is closed with unread bytes resets its connection.
        receive(self._take(sock), length)
        until = time.monotonic() + CANCEL_PATIENCE
        self._tell(sock, CANCEL, pid, first[CANCEL_HEAD.size : length], until=until)

    # --- pytest ---

    def _accept_control(self, listener: socket.socket) -> None:
        sock = accept(listener)
        if sock is None:
            return
        self._selector.unregister(listener)
        listener.close()
        os.unlink(self._control_path)
        self._control = sock
        self._watch(sock, self._serve_control)
        self._watch_listeners()

    def _serve_control(self, control: socket.socket) -> None:
        self._flush()
        received = receive(control, 4096)
        if received == b"":
            self._running = False
        self._acknowledged += received or b""
        while len(self._acknowledged) >= ACKNOWLEDGEMENT.size:
            (number,) = ACKNOWLEDGEMENT.unpack_from(self._acknowledged)
            del self._acknowledged[: ACKNOWLEDGEMENT.size]
            self._release(number)

    def _release(self, number: int) -> None:
        """Close this process's copy of a client's socket."""
        if number in self._held:
            self._held.pop(number)[0].close()

    def _tell(
        self,
        sock: socket.socket,
        kind: bytes,
        pid: int = 0,
        key: bytes = b"",
        *,
        fds: list[int] | None = None,
        until: float = NEVER,
    ) -> None:
        """Send pytest a message; the client's socket is held until it is acknowledged.

        macOS may destroy a socket that nobody has open while it is under way.
        """
        if max(len(self._held), len(self._outgoing)) >= LIMIT:
            sock.close()
            return
        self._number = (self._number + 1) % 2**32
        self._held[self._number] = sock, until
        message = HEADER.pack(kind, self._number, pid, len(key)) + key
        self._outgoing.append((self._number, message, fds or []))
        self._flush()

    def _flush(self) -> None:
        """Write what pytest's end of the control channel has room for."""
        while self._outgoing:
            number, message, fds = self._outgoing.popleft()
            try:
                sent = send(self._control, message, fds)
            except BlockingIOError:
                self._outgoing.appendleft((number, message, fds))
                break
            except OSError:  # such as too many file descriptors of this user under way
                self._release(number)
                continue
            if sent < len(message):
                self._outgoing.appendleft((number, message[sent:], []))
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        key = self._selector.get_key(self._control)
        if key.events != events:
            self._selector.modify(self._control, events, key.data)


def classify(first: bytes | None) -> str:
    """Tell what a client is by its first bytes; `None` are none yet, `b""` none any more."""
    if first is None:
        return SILENT
    if not first:
        return GONE
    if len(first) < REQUEST.size:
        return INCOMPLETE
    length, code = REQUEST.unpack_from(first)
    if code in (SSL_REQUEST, GSSENC_REQUEST) and length == REQUEST.size:
        return ENCRYPTION
    if code != CANCEL_REQUEST:
        return SESSION
    if not CANCEL_HEAD.size < length <= CANCEL_HEAD.size + LONGEST_KEY:
        return BROKEN_CANCEL
    return COMPLETE_CANCEL if len(first) >= length else INCOMPLETE_CANCEL


# --- sockets that never block ---


def listen(path: str) -> socket.socket:
    """Listen on a Unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    sock.bind(path)
    sock.listen(BACKLOG)
    return sock


def listen_by_tcp() -> socket.socket:
    """Listen on loopback, on a port that is free."""
    sock = socket.socket(socket.AF_INET)
    sock.setblocking(False)
    sock.bind((LOOPBACK, 0))
    sock.listen(BACKLOG)
    return sock


def accept(listener: socket.socket) -> socket.socket | None:
    """Accept a client, `None` where it has gone; by a Unix socket one of this user or of root."""
    try:
        sock, _ = listener.accept()
    except OSError:
        return None
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        if peer_uid(sock) in (os.geteuid(), 0):
            return sock
    sock.close()
    return None


def peer_uid(sock: socket.socket) -> int:
    """Give the user at the other end of a Unix socket."""
    if sys.platform == "darwin":
        sol_local, local_peercred, size_of_xucred = 0, 1, 76
        found: tuple[Any, ...] = struct.unpack_from(
            "=II", sock.getsockopt(sol_local, local_peercred, size_of_xucred)
        )
    else:
        found = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(found[1])


def receive(sock: socket.socket, size: int, flags: int = 0) -> bytes | None:
    """Give what is there: `None` is nothing yet, `b""` the end of the connection."""
    try:
        return sock.recv(size, flags)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def send(sock: socket.socket, message: bytes, fds: list[int]) -> int:
    """Send bytes with file descriptors, and give how many bytes have gone."""
    return socket.send_fds(sock, [message], fds) if fds else sock.send(message)


def remove_directory(path: str) -> None:
    """Remove a directory of files."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            with contextlib.suppress(OSError):
                os.unlink(f"{path}/{name}")
        os.rmdir(path)
