"""A small process that runs one PostgreSQL server and ends it, whatever becomes of pytest.

It is run as a script by `guarded_process.py`, isolated, on the standard library alone. It makes the
server's directories, starts the server's programs as its own children, and when the pipe from
pytest closes or pytest is gone it stops the server and removes the directories. So a normal end
and a SIGKILL of pytest take the same path.

Requests are JSON arrays, one a line: `["unpack", file]`, `["run", program, ...]`,
`["start", program, ...]`, `["halt", signal]`, `["publish", pid, facts]`. Each gets one JSON value
as its answer. Once published the server lives as long as that process, the controller of a run
whose workers share it, and a file in its home tells them the facts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# pathlib would make this process start 10 ms later
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH110, PTH115, PTH123

POLL = 0.005
PARENT_POLL = 0.25
STAY_POLL = 1.0
START_LIMIT = 60.0
STOP_LIMIT = 5.0
REMOVE_LIMIT = 10.0
LOG = "server.log"
DATA = "data"
PID = "guardian.pid"
PUBLISHED = "published.json"
KEPT = "kept-"


def read_lock_file(data: str) -> list[str]:
    """Give the lines of postmaster.pid, none where no server has this data directory."""
    try:
        with open(f"{data}/postmaster.pid", encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def is_ready(lines: list[str]) -> bool:
    """Tell whether a server that wrote these lines accepts connections."""
    return len(lines) >= 8 and lines[7].strip() == "ready"


def segment_of(lines: list[str]) -> int | None:
    """Find the System V shared memory segment of the server that wrote these lines."""
    fields = lines[6].split() if len(lines) >= 7 else []
    return int(fields[1]) if len(fields) == 2 and fields[1].isdigit() else None


def remove_segment(segment: int) -> None:
    """Remove a shared memory segment that a killed server could not remove."""
    import ctypes  # only where a server was killed: the import costs milliseconds

    ipc_rmid = 0
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).shmctl(segment, ipc_rmid, None)


def remove_tree(path: str) -> None:
    """Remove a directory; a process that is just ending may still write into it."""
    deadline = time.monotonic() + REMOVE_LIMIT
    while os.path.lexists(path):
        _remove_entries(path)
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL)


def _remove_entries(path: str) -> None:
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    _remove_entries(entry.path)
                    os.rmdir(entry.path)
                else:
                    os.unlink(entry.path)


def pack(source: str) -> list[bytes]:
    """Give a directory of plain files as one file: an index in its first line, then the contents.

    A disk takes one large file many times faster than a thousand small ones.
    """
    index: list[tuple[str, int | None]] = []
    contents: list[bytes] = []
    for name, data in _walk(source, ""):
        index.append((name, None if data is None else len(data)))
        contents.append(data or b"")
    return [json.dumps(index).encode() + b"\n", *contents]


def _walk(source: str, prefix: str) -> Iterator[tuple[str, bytes | None]]:
    """Give directories and what is in their files, in the order in which they can be made."""
    with os.scandir(source) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield name, None
                yield from _walk(entry.path, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                with open(entry.path, "rb", buffering=0) as file:
                    yield name, file.read()
            else:
                raise OSError(f"{entry.path} is neither a file nor a directory")


def unpack(file: str, target: str, uid: int = -1) -> None:
    """Make a directory from what was packed, for its owner alone; raises OSError, ValueError."""
    with open(file, "rb") as packed:
        _make_directory(target, uid)
        for name, size in json.loads(packed.readline()):
            if size is None:
                _make_directory(f"{target}/{name}", uid)
            else:
                _write_file(f"{target}/{name}", packed.read(size), size, uid)


def _make_directory(path: str, uid: int) -> None:
    os.mkdir(path, 0o700)
    if uid >= 0:
        os.chown(path, uid, uid)


def _write_file(path: str, content: bytes, size: int, uid: int) -> None:
    if len(content) != size:
        raise OSError("the file ends too early")
    with open(path, "xb", opener=_open_private) as writing:
        writing.write(content)
        if uid >= 0:
            os.fchown(writing.fileno(), uid, uid)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that waits for its parent to notice its end does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return os.name == "nt" or not os.path.exists("/proc/self/stat")


def end_orphan(data: str) -> None:
    """End the server of a data directory that is no child of this process, with its segment."""
    lines = read_lock_file(data)
    pid = abs(int(lines[0])) if lines and lines[0].lstrip("-").isdigit() else 0
    if pid and works_in(pid, data):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM if os.name == "nt" else signal.SIGQUIT)
            deadline = time.monotonic() + STOP_LIMIT
            while read_lock_file(data) and time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(POLL)
            if read_lock_file(data):
                os.kill(pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    segment = segment_of(read_lock_file(data))
    if segment is not None:
        remove_segment(segment)


def works_in(pid: int, data: str) -> bool:
    """Tell whether a process is the server of a data directory, not one that got its old number."""
    try:
        return os.readlink(f"/proc/{pid}/cwd") == os.path.realpath(data)
    except OSError:
        return not os.path.exists("/proc/self/cwd")


def note_kept(home: str, file: str) -> None:
    """Note that a database is kept on the server of a home as long as a file is there."""
    with open(f"{home}/{KEPT}{file.rpartition('/')[2]}", "x", encoding="utf-8") as mark:
        mark.write(file)


def has_kept(home: str) -> bool:
    """Tell whether a database is kept on the server of a home, which outlives its run then."""
    try:
        marks = [entry.path for entry in os.scandir(home) if entry.name.startswith(KEPT)]
        return any(_names_a_file(mark) for mark in marks)
    except OSError:
        return False


def _names_a_file(mark: str) -> bool:
    with open(mark, encoding="utf-8") as file:
        return os.path.exists(file.read())


class Guardian:
    """The server of one run: its directories and the program that is running now."""

    def __init__(self, parent: int, uid: int, directories: list[str]) -> None:
        self.parent = parent
        self.uid = uid
        self.directories: list[str] = []
        self.home = directories[0]
        self.data = f"{self.home}/{DATA}"
        self.child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._handed_over = uid < 0
        self._run = 0

    def make_directories(self, paths: list[str]) -> None:
        """Make the server's directories; only what was made here is ever removed."""
        for path in paths:
            os.mkdir(path, 0o700)
            self.directories.append(path)
        self._tell(PID, str(os.getpid()))

    def _tell(self, name: str, text: str) -> None:
        """Write a file of the home that others find complete or not at all."""
        partial = f"{self.home}/{name}.partial"
        with open(partial, "x", encoding="utf-8") as file:
            file.write(text)
        os.rename(partial, f"{self.home}/{name}")

    def _hand_over(self) -> None:
        """Give the directories to the server's user, once root has nothing to write in them."""
        if not self._handed_over:
            self._handed_over = True
            for path in self.directories:
                os.chown(path, self.uid, self.uid)

    def _take_back(self) -> None:
        """Let root write where no other user can put a link in its way."""
        if self.uid >= 0 and self._handed_over:
            self._handed_over = False
            os.chown(self.home, os.geteuid(), os.getegid())

    def serve(self) -> None:
        """Answer requests until pytest closes the pipe, and wait for the run's end if there is one.

        The watching thread ends this process then.
        """
        for line in sys.stdin:
            verb, *arguments = json.loads(line)
            try:
                result = getattr(self, f"do_{verb}")(*arguments)
            except OSError as error:
                answer({"error": str(error)})
            else:
                answer({"result": result})
        if self._run:
            self._watching.join()
        self.stay()

    def do_unpack(self, file: str) -> bool:
        """Make the data directory from one that was packed; tell whether it is whole."""
        self._take_back()
        remove_tree(self.data)
        try:
            unpack(file, self.data, self.uid)
        except (OSError, ValueError):
            remove_tree(self.data)
            return False
        return True

    def do_publish(self, pid: int, facts: dict[str, str]) -> None:
        """Tell others of the server, and live from now on as long as another process does."""
        self._run = pid
        self._tell(PUBLISHED, json.dumps(facts))

    def do_run(self, *argv: str) -> int:
        """Run a program to its end and give its exit code."""
        code = self._spawn(argv).wait()
        self._end_child(signal.SIGTERM)  # what it started may have died and left shared memory
        return code

    def do_start(self, *argv: str) -> int | None:
        """Start the server; give its pid once it accepts connections, `None` where it fails to."""
        child = self._spawn(argv)
        deadline = time.monotonic() + START_LIMIT
        while child.poll() is None and time.monotonic() < deadline:
            lines = read_lock_file(self.data)
            if is_ready(lines) and lines[0] == str(child.pid):
                return child.pid
            time.sleep(POLL)
        self._end_child(signal.SIGTERM)
        return None

    def do_halt(self, signal_name: str) -> None:
        """Stop the server and keep its directories."""
        self._end_child(getattr(signal, signal_name))

    def watch(self) -> None:
        """Start to end everything once pytest is gone, also where a fork of it holds the pipe."""
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _watch(self) -> None:
        while is_alive(self._run) if self._run else os.getppid() == self.parent:
            time.sleep(PARENT_POLL)
        self.stay()
        self.end()
        os._exit(0)

    def stay(self) -> None:
        """Wait as long as a database of a failed test is kept on the server."""
        child = self.child
        while child is not None and child.poll() is None and has_kept(self.home):
            time.sleep(STAY_POLL)

    def end(self) -> None:
        """Stop the server and remove its directories; once, whichever thread asks first."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._end_child(signal.SIGTERM if os.name == "nt" else signal.SIGQUIT)
            for path in reversed(self.directories):
                remove_tree(path)

    def _spawn(self, argv: tuple[str, ...]) -> subprocess.Popen[bytes]:
        user: dict[str, Any] = {}
        if self.uid >= 0:
            user = {"user": self.uid, "group": self.uid, "extra_groups": []}
        with self._lock, open(f"{self.home}/{LOG}", "ab") as log:
            if self._ended:
                raise OSError("the server is being removed")
            self._hand_over()
            self.child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,
                **user,
            )
            return self.child

    def _end_child(self, number: int) -> None:
        child, self.child = self.child, None
        if child is None:
            return
        if child.poll() is None:
            child.send_signal(number)
        deadline = time.monotonic() + STOP_LIMIT
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)
        if child.poll() is None:
            _kill_group(child)
        segment = segment_of(read_lock_file(self.data))
        if segment is not None:  # it was killed, by us or by somebody else
            remove_segment(segment)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill a program that does not end, and what it started: initdb runs servers of its own."""
    with contextlib.suppress(OSError):
        if os.name == "nt":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main(parent: str, uid: str, *directories: str) -> None:
    guardian = Guardian(int(parent), int(uid), list(directories))
    set_signals(lambda *_: sys.exit(0))
    try:
        if os.name != "nt":
            if os.getppid() != guardian.parent:
                return
            guardian.watch()
        try:
            guardian.make_directories(list(directories))
        except OSError as error:
            answer({"error": str(error), "taken": isinstance(error, FileExistsError)})
            return
        answer({"result": None})
        guardian.serve()
    except BrokenPipeError:
        pass  # pytest is gone: nobody reads answers any more
    finally:
        set_signals(signal.SIG_IGN)
        guardian.end()
        detach_output()


def set_signals(handler: Any) -> None:
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def detach_output() -> None:
    """Let the interpreter's last flush of stdout go nowhere, as its reader may be gone."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
