"""The gateway's listener and its porter: real processes and sockets."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.remains import NEEDS_PROC, NEEDS_ROOT, processes_of
from helpers.waiting import PATIENCE, wait_until

from pytest_pgmonkey.testing.gateway.entrance import porter
from pytest_pgmonkey.testing.gateway.entrance.listener import Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs Unix sockets")

ROOT = Path(__file__).parents[2]
STARTUP = struct.pack("!II", 23, 3 << 16) + b"user\0pgmonkey\0\0"
SSL = struct.pack("!II", 8, porter.SSL_REQUEST)
GSSENC = struct.pack("!II", 8, porter.GSSENC_REQUEST)
PORT = porter.PORTS[0]
NOBODY = 65534
# Python 3.12 warns of each fork of a process with threads.
WARNINGS = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]


def cancel_request(pid: int, key: bytes) -> bytes:
    return struct.pack("!IIi", 12 + len(key), porter.CANCEL_REQUEST, pid) + key


class Gateway:
    """A listener, what it gets, and clients of it that are closed with `stack`."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        on_client: Callable[[socket.socket], object] | None = None,
        on_cancel: Callable[[int, bytes], object] | None = None,
        patience: float = 2 * PATIENCE,  # no test passes because the porter's has an end
    ) -> None:
        self.stack = stack
        self.clients: queue.Queue[socket.socket] = queue.Queue()
        self.cancels: queue.Queue[tuple[int, bytes]] = queue.Queue()
        self.listener = Listener(
            on_client or self.take,
            on_cancel or (lambda *cancel: self.cancels.put(cancel)),
            patience=patience,
        )

    def take(self, sock: socket.socket) -> None:
        self.clients.put(self.stack.enter_context(sock))

    def path(self, port: int = PORT) -> Path:
        return self.listener.directory / f"{porter.SOCKET}{port}"

    def connect(self, first: bytes = b"", port: int = PORT) -> socket.socket:
        client = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(PATIENCE)
        client.connect(str(self.path(port)))
        client.sendall(first)
        return client

    def accepted(self) -> socket.socket:
        return self.clients.get(timeout=PATIENCE)

    def cancelled(self) -> tuple[int, bytes]:
        return self.cancels.get(timeout=PATIENCE)

    def join(self, first: bytes = STARTUP) -> tuple[socket.socket, socket.socket]:
        """Give both ends of a client's connection that has sent these bytes."""
        client, server = self.connect(first), self.accepted()
        assert read(server, len(first)) == first
        return client, server


@pytest.fixture
def make_gateway() -> Iterator[Callable[..., Gateway]]:
    """A function that makes a gateway of the test's own."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Gateway:
            gateway = Gateway(stack, **options)
            stack.callback(gateway.listener.close)
            return gateway

        yield make


@pytest.fixture(scope="module")
def shared_gateway() -> Iterator[Gateway]:
    gateway = Gateway(contextlib.ExitStack())
    yield gateway
    gateway.listener.close()


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Iterator[Gateway]:
    """A gateway for tests that leave nothing undecided."""
    with contextlib.ExitStack() as shared_gateway.stack:
        yield shared_gateway
    assert shared_gateway.clients.empty()
    assert shared_gateway.cancels.empty()


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def is_served(gateway: Gateway) -> bool:
    """A new client gets through, both ways."""
    client, server = gateway.join()
    server.sendall(b"answer")
    return read(client, 6) == b"answer"


def is_closed(client: socket.socket) -> bool:
    """The other end is closed; bytes that nobody had read reset the connection."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


class TestClients:
    def test_a_client_is_handed_over_with_its_connection(self, gateway):
        """Both directions work, and the end of one side is seen by the other."""
        client, server = gateway.join()
        client.sendall(b"question")
        assert read(server, 8) == b"question"
        server.sendall(b"answer")
        assert read(client, 6) == b"answer"
        server.close()
        assert client.recv(1) == b""

    def test_the_socket_blocks_and_is_not_inherited(self, gateway):
        """It is like any other of Python's, whatever the process has as its default."""
        socket.setdefaulttimeout(1.0)
        try:
            _, server = gateway.join()
        finally:
            socket.setdefaulttimeout(None)
        assert server.gettimeout() is None
        assert os.get_blocking(server.fileno())
        assert not server.get_inheritable()
        assert server.family == socket.AF_UNIX

    def test_the_directory_is_the_user_s_alone(self, gateway):
        """Nobody else enters it, and the control channel has no name once it is connected."""
        directory = gateway.listener.directory
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert is_served(gateway)
        assert set(directory.iterdir()) == {gateway.path(port) for port in porter.PORTS}

    @pytest.mark.parametrize("port", porter.PORTS)
    def test_the_socket_tells_to_which_port_it_came(self, gateway, port):
        """Its name is the path that the client knows."""
        gateway.connect(STARTUP, port)
        assert gateway.accepted().getsockname() == str(gateway.path(port))

    @pytest.mark.parametrize("asked", [[SSL], [GSSENC], [GSSENC, SSL]], ids=len)
    def test_encryption_is_refused(self, gateway, asked):
        """The client stays in plain text, and what it sends then is handed over."""
        client = gateway.connect()
        for request in asked:
            client.sendall(request)
            assert client.recv(2) == b"N"
        client.sendall(STARTUP)
        assert read(gateway.accepted(), len(STARTUP)) == STARTUP

    def test_encryption_is_refused_once(self, gateway):
        """A client that asks again is the gateway's matter."""
        client = gateway.connect(SSL)
        assert client.recv(2) == b"N"
        client.sendall(SSL)
        assert read(gateway.accepted(), len(SSL)) == SSL

    def test_many_clients_at_once(self, gateway):
        """Each gets through with its own bytes, in whatever order."""
        firsts = {b"%08d" % number for number in range(50)}
        for first in firsts:
            gateway.connect(first)
        assert {read(gateway.accepted(), 8) for _ in firsts} == firsts

    @NEEDS_ROOT
    def test_another_user_is_refused(self, make_gateway):
        """The mode of the directory is not the only thing that keeps others out."""
        gateway = make_gateway()
        gateway.listener.directory.chmod(0o711)
        gateway.path().chmod(0o777)
        code = f"""
            import os, socket
            os.setuid({NOBODY})
            with socket.socket(socket.AF_UNIX) as client:
                client.connect({str(gateway.path())!r})
                print(client.recv(1))
        """
        assert run(code).communicate(timeout=PATIENCE) == (b"b''\n", b"")
        assert gateway.clients.empty()
        assert is_served(gateway)


class TestCancels:
    @pytest.mark.parametrize("length", [4, 32, 256])
    def test_a_cancel_request_is_told_and_its_socket_closed(self, gateway, length):
        """Keys have four bytes in protocol 3.0, and up to 256 in 3.2."""
        key = os.urandom(length)
        client = gateway.connect(cancel_request(4711, key))
        assert client.recv(1) == b""
        assert gateway.cancelled() == (4711, key)

    def test_encryption_may_be_asked_for_before(self, gateway):
        """libpq sends both on one connection."""
        client = gateway.connect(SSL)
        assert client.recv(2) == b"N"
        client.sendall(cancel_request(-1, b"1234"))
        assert client.recv(1) == b""
        assert gateway.cancelled() == (-1, b"1234")

    def test_a_cancel_request_in_two_parts(self, gateway):
        """It is read whole."""
        request = cancel_request(7, b"12345678")
        client = gateway.connect(request[:10])
        assert is_served(gateway)  # by then the porter has seen the first part
        client.sendall(request[10:])
        assert client.recv(1) == b""
        assert gateway.cancelled() == (7, b"12345678")

    @pytest.mark.parametrize("key", [b"", b"k" * 257], ids=["no key", "a long key"])
    def test_a_broken_cancel_request_is_closed(self, gateway, key):
        """A key has at least one byte, and at most 256."""
        assert is_closed(gateway.connect(cancel_request(7, key)[:12]))
        assert is_served(gateway)

    def test_cancel_requests_one_after_the_other(self, gateway):
        """Each of many is told, in their order."""
        for number in range(20):
            assert gateway.connect(cancel_request(number, b"1234")).recv(1) == b""
        assert [gateway.cancelled()[0] for _ in range(20)] == list(range(20))

    def test_a_client_that_holds_the_gil_is_let_go(self, gateway):
        """psycopg2 waits so in PQcancel: no Python code of this process runs meanwhile."""
        client = gateway.connect()
        client.settimeout(None)
        limit = struct.pack("ll", int(PATIENCE), 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        libc = ctypes.PyDLL(None)
        request = cancel_request(7, b"1234")
        assert libc.send(client.fileno(), request, len(request), 0) == len(request)
        assert libc.recv(client.fileno(), ctypes.create_string_buffer(1), 1, 0) == 0
        assert gateway.cancelled() == (7, b"1234")

    def test_a_callback_that_waits_does_not_hold_the_client(self, make_gateway):
        """It is let go after a moment, and others are served once the callback is through."""
        proceed = threading.Event()
        gateway = make_gateway(on_cancel=lambda *_: proceed.wait(PATIENCE))
        try:
            assert gateway.connect(cancel_request(7, b"1234")).recv(1) == b""
        finally:
            proceed.set()
        assert is_served(gateway)


class TestMisbehaviour:
    @pytest.mark.parametrize(
        "first",
        [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 8, b"\x16\x03\x01\x02\0\x01\0\x01", b"\xff" * 5000],
        ids=["HTTP", "zeros", "TLS", "much"],
    )
    def test_garbage_is_handed_over_unread(self, gateway, first):
        """What answers it is the gateway's matter."""
        gateway.join(first)
        assert is_served(gateway)

    def test_silent_clients_and_half_messages(self, make_gateway):
        """They keep nobody waiting."""
        gateway = make_gateway()
        for first in (b"", STARTUP[:5], SSL[:3], cancel_request(7, b"1234")[:13]):
            gateway.connect(first)
        assert is_served(gateway)

    def test_patience_has_an_end(self, make_gateway):
        """Then clients are handed over as they are."""
        gateway = make_gateway(patience=0.01)
        for first in (b"", STARTUP[:5], SSL[:3]):
            client, server = gateway.join(first)
            client.sendall(STARTUP)
            assert read(server, len(STARTUP)) == STARTUP

    def test_half_a_message_that_is_completed(self, gateway):
        """It is looked at again before the moment is over."""
        client = gateway.connect(SSL[:3])
        assert is_served(gateway)
        client.sendall(SSL[3:])
        assert client.recv(2) == b"N"

    def test_more_silent_clients_than_are_kept(self, make_gateway):
        """The oldest are handed over at once; half a cancel request has no use for that."""
        gateway = make_gateway()
        half_a_cancel = gateway.connect(cancel_request(7, b"1234")[:13])
        clients = [gateway.connect() for _ in range(porter.LIMIT + 20)]
        assert is_closed(half_a_cancel)
        for number, client in enumerate(clients[:20]):
            client.sendall(b"%08d" % number)
            assert read(gateway.accepted(), 8) == b"%08d" % number

    def test_more_clients_than_can_wait_for_the_gateway(self, make_gateway):
        """Some are closed, and those that cancel in any case: nobody waits without end."""
        proceed = threading.Event()

        def take(sock: socket.socket) -> None:
            proceed.wait(PATIENCE)
            with sock:
                sock.sendall(b"served")

        gateway = make_gateway(on_client=take)
        try:
            clients = [gateway.connect(STARTUP) for _ in range(porter.LIMIT + 20)]
            assert is_closed(gateway.connect(cancel_request(7, b"1234")))
        finally:
            proceed.set()
        served = [client for client in clients if not is_closed(client)]
        assert porter.LIMIT <= len(served) < len(clients)

    def test_clients_that_go_at_once(self, gateway):
        """Nobody hears of them."""
        for _ in range(20):
            gateway.connect().close()
        assert is_served(gateway)

    def test_failing_callbacks(self, make_gateway, caplog):
        """They are logged, their clients closed, and the next ones served."""

        def fail(*_: object) -> None:
            pytest.fail("on purpose")

        gateway = make_gateway(on_client=fail, on_cancel=fail)
        for first in (STARTUP, cancel_request(7, b"1234"), STARTUP):
            assert is_closed(gateway.connect(first))
        gateway.listener.close()
        assert [record.name for record in caplog.records] == ["pytest_pgmonkey"] * 3
        assert "on purpose" in caplog.text


def test_a_full_control_channel() -> None:
    """What pytest does not read yet is sent when there is room again."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        running = porter.Porter(directory, PATIENCE)
        running.start()
        stack.callback(running.stop)

        def connect(name: str, first: bytes = b"") -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(PATIENCE)
            sock.connect(f"{directory}/{name}")
            sock.sendall(first)
            return sock

        def receive() -> tuple[int, bytes]:
            data, fds, _, _ = socket.recv_fds(control, porter.HEADER.size, 1)
            with socket.socket(fileno=fds[0]) as server:
                return porter.HEADER.unpack(data)[1], read(server, 8)

        control = connect(porter.CONTROL)
        clients = f"{porter.SOCKET}{PORT}"
        connect(clients, b"%08d" % 0)
        assert receive() == (1, b"%08d" % 0)
        running._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for number in range(1, 50):
            connect(clients, b"%08d" % number)
        assert wait_until(lambda: running._outgoing)
        assert sorted(receive() for _ in range(49)) == [(n + 1, b"%08d" % n) for n in range(1, 50)]
        assert not running._outgoing


# --- ends ---


def run(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *WARNINGS, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # what a buffer reads ahead is lost to communicate()
    )


PRELUDE = """
import ctypes, os, signal, socket, sys
from pytest_pgmonkey.testing.gateway.entrance.listener import Listener

def take(client):
    client.sendall(b"served")
    client.close()

listener = Listener(take, print)
print(listener.directory, flush=True)

def is_served():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(listener.directory / ".s.PGSQL.5432"))
        client.sendall(bytes(8))
        return client.recv(6) == b"served"
"""


@pytest.fixture
def script() -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], Path]]]:
    """A function that runs Python code with a listener, and gives the process and directory."""
    running = []

    def start(code: str) -> tuple[subprocess.Popen[bytes], Path]:
        running.append(process := run(PRELUDE + textwrap.dedent(code)))
        line = process.stdout.readline().strip()
        assert line, process.communicate()
        return process, Path(os.fsdecode(line))

    yield start
    for process in running:
        process.kill()
        process.communicate()


class TestEnds:
    def test_close_leaves_nothing(self, make_gateway):
        """The thread, the porter and the directory are gone when it returns; twice is once."""
        threads = threading.active_count()
        gateway = make_gateway()
        directory = gateway.listener.directory
        assert is_served(gateway)
        client = gateway.connect()
        gateway.listener.close()
        assert is_closed(client)
        assert threading.active_count() == threads
        assert not directory.exists()
        assert not processes_of(directory)
        gateway.listener.close()

    def test_a_client_that_was_handed_over_outlives_it(self, make_gateway):
        """What becomes of it is decided by the one who has it."""
        gateway = make_gateway()
        client, server = gateway.join()
        gateway.listener.close()
        server.sendall(b"still here")
        assert read(client, 10) == b"still here"

    def test_close_in_a_callback(self, make_gateway):
        """It cannot wait for its own thread, but for everything else."""
        closed: queue.Queue[bool] = queue.Queue()

        def close(sock: socket.socket) -> None:
            with sock:
                gateway.listener.close()
                closed.put(gateway.listener.directory.exists())

        gateway = make_gateway(on_client=close)
        client = gateway.connect(STARTUP)
        assert closed.get(timeout=PATIENCE) is False
        assert is_closed(client)

    @NEEDS_PROC
    def test_a_killed_porter_is_logged_and_its_directory_removed(self, make_gateway, caplog):
        """Nobody would wait for clients that cannot come."""
        gateway = make_gateway()
        directory = gateway.listener.directory
        (pid,) = processes_of(directory)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: "porter has ended" in caplog.text)
        gateway.listener.close()
        assert not directory.exists()

    def test_a_process_that_ends_leaves_nothing(self, script):
        """Also where nobody has closed the listener, and without a warning."""
        process, directory = script("print(is_served())")
        assert process.communicate(timeout=PATIENCE) == (b"True\n", b"")
        assert not directory.exists()

    @NEEDS_PROC
    @pytest.mark.parametrize("fork", ["0", "os.fork()", "ctypes.PyDLL(None).fork()"])
    def test_nothing_is_left_after_a_sigkill(self, script, fork):
        """Not where a fork lives on either, which has inherited every pipe and socket."""
        process, directory = script(f"if child := {fork}: print(child, flush=True)\nsignal.pause()")
        child = int(process.stdout.readline()) if fork != "0" else 0
        try:
            assert processes_of(directory)
            process.kill()
            assert wait_until(lambda: not (directory.exists() or processes_of(directory)))
        finally:
            if child:
                os.kill(child, signal.SIGKILL)

    @pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
    def test_a_fork_leaves_the_listener_to_its_parent(self, script, fork):
        """Neither its end nor its `close()` changes anything for the parent."""
        process, directory = script(
            f"""
            if not (child := {fork}()):
                listener.close()
                sys.exit()
            assert (child, 0) == os.waitpid(child, 0)
            print(is_served(), listener.directory.exists())
            """
        )
        assert process.communicate(timeout=PATIENCE) == (b"True True\n", b"")
        assert not directory.exists()

    def test_a_fork_has_no_part_in_the_control_channel(self, script):
        """While it lives, its clients and those of the parent reach the parent."""
        process, _ = script(
            """
            if not (child := os.fork()):
                os._exit(not is_served())
            print(is_served(), os.waitpid(child, 0)[1])
            """
        )
        assert process.communicate(timeout=PATIENCE) == (b"True 0\n", b"")

    @NEEDS_PROC
    def test_an_interrupt_of_the_terminal_is_pytest_s_alone(self, script):
        """The porter is in a session of its own: pytest may still need it to clean up."""
        process, directory = script("signal.pause()")
        sessions = {os.getsid(pid) for pid in processes_of(directory)}
        assert sessions == processes_of(directory)
        assert process.pid not in sessions
