"""The pytest side of the porter: receives its clients and cancel requests on a thread."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import socket
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

from ...addresses.purpose import Purpose
from ...servers.embedded.directories import ON_WINDOWS, choose_directories
from ...servers.guard import Guard
from ...servers.server import ServerStartError
from . import porter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["Listener"]

logger = logging.getLogger("pytest_pgmonkey")

SIZE: Final = 65536
MOST_SOCKETS: Final = 64
CLOSE_ON_EXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # macOS has no such flag


class Listener:
    """A Unix socket for PostgreSQL clients; its directory ends with this process at the latest.

    `on_client` gets each client's socket and owns it. `on_cancel` gets the process id and the key
    of each cancel request. Both are called on one thread, and the next client waits for them.
    A client that sends nothing, or half a message, is handed over after `patience` seconds.
    """

    def __init__(
        self,
        on_client: Callable[[socket.socket], None],
        on_cancel: Callable[[int, bytes], None],
        *,
        patience: float = 1.0,
    ) -> None:
        if ON_WINDOWS:
            raise ServerStartError("The gateway cannot run: it needs Unix sockets.")
        self._on_client = on_client
        self._on_cancel = on_cancel
        self._closed = False
        self._porter = _PorterProcess(choose_directories(None)[-1], patience)
        self.directory = self._porter.directory
        self._by_tcp: list[int] = []
        self._opening = threading.Lock()
        self._control = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, name="pgmonkey-gateway", daemon=True)
        try:
            self._control.settimeout(None)  # whatever the default of the process is
            self._control.connect(str(self.directory / porter.CONTROL))
            self._thread.start()
        except BaseException:
            self.close()
            raise
        _living.add(self)
        atexit.register(self.close)

    def port(self, purpose: Purpose) -> int:
        """Give the port of the Unix socket."""
        return porter.PORTS[purpose]

    def port_by_tcp(self, purpose: Purpose) -> int:
        """Give the port on loopback; there is none before somebody asks for one.

        Anybody on this machine can connect to it.
        """
        with self._opening:
            self._by_tcp = self._by_tcp or self._porter.ask("listen_by_tcp")
        return self._by_tcp[purpose]

    def purpose_of(self, sock: socket.socket) -> Purpose:
        """Tell what a client has come for."""
        name = sock.getsockname()
        if sock.family == socket.AF_INET:
            return Purpose(self._by_tcp.index(name[1]))
        return Purpose(porter.PORTS.index(int(name.rpartition(".")[2])))

    def close(self) -> None:
        """Accept nobody any more, and remove the directory; a second call does nothing."""
        self._closed = True
        atexit.unregister(self.close)
        if not self._porter.is_foreign:
            with contextlib.suppress(OSError):  # already closed, or never connected
                self._control.shutdown(socket.SHUT_RDWR)
            if self._thread.is_alive() and self._thread is not threading.current_thread():
                self._thread.join()
        self._control.close()
        self._porter.end()

    def disown(self) -> None:
        """Forget the porter, which is another process's: called in a fork."""
        self._control.close()  # a shutdown would end the parent's channel as well

    # --- the thread ---

    def _serve(self) -> None:
        received = bytearray()
        fds: deque[int] = deque()
        with contextlib.suppress(OSError):  # the porter or the channel is closed
            while self._receive(received, fds):
                for kind, number, pid, key in _messages(received):
                    if kind == porter.CLIENT:
                        self._acknowledge(number)  # the porter's copy must not hold it open
                        self._take_client(fds)
                    else:
                        self._call(self._on_cancel, pid, key)
                        self._acknowledge(number)
        for fd in fds:
            os.close(fd)
        if not (self._closed or self._porter.is_foreign):
            logger.error("The gateway's porter has ended: no client can connect any more.")

    def _receive(self, received: bytearray, fds: deque[int]) -> bool:
        data, new, _, _ = socket.recv_fds(self._control, SIZE, MOST_SOCKETS, CLOSE_ON_EXEC)
        received += data
        fds += new
        return bool(data)

    def _acknowledge(self, number: int) -> None:
        self._control.sendall(porter.ACKNOWLEDGEMENT.pack(number))

    def _take_client(self, fds: deque[int]) -> None:
        if not fds:
            logger.error("A client is lost: this process can open no more files.")
            return
        sock = socket.socket(fileno=fds.popleft())
        sock.set_inheritable(False)
        sock.settimeout(None)
        if not self._call(self._on_client, sock):
            sock.close()

    def _call(self, callback: Callable[..., None], *args: object) -> bool:
        try:
            callback(*args)
        except BaseException:  # pytest's outcomes are no Exceptions, and others would wait
            logger.exception("The gateway failed in %r.", callback)
            return False
        return True


def _messages(received: bytearray) -> Iterator[tuple[bytes, int, int, bytes]]:
    """Take the complete messages: kind, number, process id, key."""
    head = porter.HEADER.size
    while len(received) >= head:
        kind, number, pid, length = porter.HEADER.unpack_from(received)
        if len(received) < head + length:
            return
        key = bytes(received[head : head + length])
        del received[: head + length]
        yield kind, number, pid, key


class _PorterProcess(Guard):
    """The process of the porter, with the directory that it has made."""

    guarded = "gateway"

    def __init__(self, directory: Path, patience: float) -> None:
        self.directory = directory
        self._made = False
        super().__init__(porter, directory, patience)
        try:
            self.ask("make")
        except BaseException:
            self.end()  # a directory that was there before is not ours to remove
            raise
        self._made = True

    def end(self) -> bool:
        """End the porter and remove its directory, also where it was killed."""
        ended = super().end()
        if ended and self._made:
            shutil.rmtree(self.directory, ignore_errors=True)
        return ended


_living: weakref.WeakSet[Listener] = weakref.WeakSet()


def _disown_all() -> None:
    for listener in list(_living):
        listener.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
