"""The guardian of an embedded server: runs its programs as children, in directories of its own.

Nothing but the standard library is imported here, and of that little: every start waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from typing import Any

from .. import guardian

# pathlib would make this process start 10 ms later
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH110, PTH115, PTH123

POLL = 0.005
START_LIMIT = 60.0
STOP_LIMIT = 5.0
REMOVE_LIMIT = 10.0
LOG = "server.log"
DATA = "data"
PID = "guardian.pid"
PUBLISHED = "published"
KEPT = "kept-"


class Guardian(guardian.Guardian):
    """The server of one run: its directories and the program that is running now."""

    def __init__(self, parent: str, uid: str, home: str, *others: str) -> None:
        super().__init__(parent)
        self.uid = int(uid)
        self.home = home
        self.data = f"{home}/{DATA}"
        self.directories: list[str] = []
        self._missing = [home, *others]
        self.child: subprocess.Popen[bytes] | None = None
        os.umask(0o077)

    def do_make(self) -> None:
        """Make the server's directories; only what was made here is ever removed."""
        for path in self._missing:
            os.mkdir(path)
            self.directories.append(path)
        self.do_write(PID, str(os.getpid()))

    def do_write(self, name: str, text: str) -> None:
        """Write a file of the home that others find complete or not at all."""
        partial = f"{self.home}/{name}.partial"
        with open(partial, "x", encoding="utf-8") as file:
            file.write(text)
        os.rename(partial, f"{self.home}/{name}")

    def do_unpack(self, file: str) -> bool:
        """Make the data directory from one that was packed; tell whether it is whole."""
        if self.uid >= 0:
            # No other user can put a link in root's way then.
            os.chown(self.home, os.geteuid(), os.getegid())
        remove_tree(self.data)
        try:
            unpack(file, self.data, self.uid)
        except (OSError, ValueError):
            remove_tree(self.data)
            return False
        return True

    def do_run(self, *argv: str) -> int:
        """Run a program to its end and give its exit code."""
        code = self._spawn(argv).wait()
        self._end_child(signal.SIGTERM)  # what it started may have died and left shared memory
        return code

    def do_start(self, *argv: str) -> bool:
        """Start the server; tell whether it accepts connections now."""
        child = self._spawn(argv)
        deadline = time.monotonic() + START_LIMIT
        while child.poll() is None and time.monotonic() < deadline:
            lines = read_lock_file(self.data)
            if len(lines) >= 8 and lines[7].strip() == "ready" and lines[0] == str(child.pid):
                return True
            time.sleep(POLL)
        self._end_child(signal.SIGTERM)
        return False

    def do_halt(self, signal_name: str) -> None:
        """Stop the server with a signal and keep its data."""
        self._end_child(getattr(signal, signal_name))

    def is_kept(self) -> bool:
        child = self.child
        return child is not None and child.poll() is None and has_kept(self.home)

    def clean_up(self) -> None:
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
            if self.uid >= 0:  # root has nothing to write in them now
                for path in self.directories:
                    os.chown(path, self.uid, self.uid)
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
            with contextlib.suppress(OSError):
                if os.name == "nt":
                    child.kill()
                else:  # with what it has started: initdb runs servers of its own
                    os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        remove_segment(self.data)  # it is there where the server was killed, by whomever


# --- directories ---


def remove_tree(path: str) -> None:
    """Remove a directory; a process that is just ending may still write into it.

    shutil's would take twice as long, and pytest waits for it.
    """
    deadline = time.monotonic() + REMOVE_LIMIT
    while os.path.lexists(path) and time.monotonic() < deadline:
        _remove_entries(path)
        try:
            os.rmdir(path)
        except OSError:
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


def unpack(file: str, target: str, uid: int = -1) -> None:
    """Make a directory from what `saved_clusters` has packed; raises OSError, ValueError."""
    with open(file, "rb") as packed:
        for name, size in [("", None), *json.loads(packed.readline())]:
            path = f"{target}/{name}" if name else target
            if size is None:
                os.mkdir(path)
            else:
                content = packed.read(size)
                if len(content) != size:
                    raise OSError("the file ends too early")
                with open(path, "xb") as unpacked:
                    unpacked.write(content)
            if uid >= 0:
                os.chown(path, uid, uid)


def has_kept(home: str) -> bool:
    """Tell whether a database is kept on the server of a home, which outlives its run then."""
    try:
        marks = [entry.path for entry in os.scandir(home) if entry.name.startswith(KEPT)]
        return any(map(os.path.exists, marks))  # of a link: whether its file exists
    except OSError:
        return False


# --- servers ---


def read_lock_file(data: str) -> list[str]:
    """Give the lines of postmaster.pid, none where no server has this data directory."""
    try:
        with open(f"{data}/postmaster.pid", encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def remove_segment(data: str) -> None:
    """Remove the System V shared memory that a killed server could not remove."""
    lines = read_lock_file(data)
    fields = lines[6].split() if len(lines) >= 7 else []
    if len(fields) == 2 and fields[1].isdigit():
        import ctypes  # only where a server was killed: the import costs milliseconds

        ipc_rmid = 0
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).shmctl(int(fields[1]), ipc_rmid, None)


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
    remove_segment(data)


def works_in(pid: int, data: str) -> bool:
    """Tell whether a process is the server of a data directory, not one that got its old number."""
    try:
        return os.readlink(f"/proc/{pid}/cwd") == os.path.realpath(data)
    except OSError:
        return not os.path.exists("/proc/self/cwd")
