"""The pytest side of the guardian: asks it for programs, and lets it end them."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from ..server import ServerStartError
from . import guardian

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["DirectoryTakenError", "GuardedProcess", "read_log"]

LOG_LINES = 15


class DirectoryTakenError(ServerStartError):
    """A directory of the server is there already."""


class GuardedProcess:
    """The directories and programs of one server, in the hands of a guardian.

    The first directory is the home: it holds the data directory and the log.
    """

    def __init__(self, directories: Sequence[Path], uid: int | None) -> None:
        self.directories = list(directories)
        self.home = self.directories[0]
        self.data = self.home / guardian.DATA
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._waiting = False
        self._process: subprocess.Popen[str] | None = _spawn(self._owner, uid, self.directories)
        _living.add(self)
        try:
            self._result(self._read(self._process))
        except BaseException:
            self.directories = []  # what was there before the guardian is not ours to remove
            self.end()
            raise

    def unpack(self, file: Path) -> bool:
        """Make the data directory from one that was packed; tell whether all of it was there."""
        return bool(self._request("unpack", str(file)))

    def publish(self, controller: int, facts: dict[str, str]) -> None:
        """Leave the server to a whole run: it ends with that process, no longer with this one."""
        self._request("publish", controller, facts)
        self.forget()

    def run(self, *argv: str) -> int:
        """Run a program to its end and give its exit code."""
        return int(self._request("run", *argv))

    def start(self, *argv: str) -> bool:
        """Start the server; tell whether it accepts connections now."""
        return self._request("start", *argv) is not None

    def halt(self, signal_name: str) -> None:
        """Stop the server with a signal and keep its data."""
        self._request("halt", signal_name)

    def log(self) -> str:
        """Give the last lines that the programs wrote."""
        return read_log(self.home)

    def end(self) -> None:
        """Stop everything and remove the directories; only in the process that made them."""
        if os.getpid() != self._owner:
            self.forget()
            return
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            if guardian.has_kept(str(self.home)):
                _let_go(process)
                return
            if self._waiting:  # interrupted: it would first finish what it is at
                process.terminate()
            _close_pipes(process)
            process.wait()
        for path in self.directories:
            if path.exists():  # the guardian itself was killed
                guardian.end_orphan(str(self.data))
                guardian.remove_tree(str(path))

    def forget(self) -> None:
        """Let go in a fork: the server is not the child's to end, nor to hold open."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process is not None:
            _let_go(process)

    def _request(self, *request: Any) -> Any:
        with self._lock:
            process = self._process
            if process is None or process.stdin is None or self._waiting:
                raise ServerStartError("The embedded server was stopped.")
            self._waiting = True
            with contextlib.suppress(BrokenPipeError):  # then there is no answer either
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = self._read(process)
            self._waiting = False
        return self._result(line)

    def _read(self, process: subprocess.Popen[str]) -> str:
        return process.stdout.readline() if process.stdout else ""

    def _result(self, line: str) -> Any:
        answer = json.loads(line) if line else {"error": "the process that guards it has ended"}
        if "error" in answer:
            kind = DirectoryTakenError if answer.get("taken") else ServerStartError
            raise kind(f"The embedded server cannot run: {answer['error']}.", log=self.log())
        return answer["result"]


def read_log(home: Path) -> str:
    """Give the last lines of the log in a server's home."""
    try:
        text = (home / guardian.LOG).read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LOG_LINES:])


def server_environment() -> dict[str, str]:
    """Give the environment of the server's programs, without what changes what they do."""
    passed = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "PYTHON"))}
    return {**passed, "LC_ALL": "C", "TZ": "UTC"}


def _spawn(owner: int, uid: int | None, directories: Sequence[Path]) -> subprocess.Popen[str]:
    facts = [str(owner), str(-1 if uid is None else uid), *map(str, directories)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", guardian.__file__, *facts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        cwd=os.sep,
        env=server_environment(),
        start_new_session=True,
    )


def _let_go(process: subprocess.Popen[str]) -> None:
    process.returncode = 0  # or its finalizer warns of a process still running
    _close_pipes(process)


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


_living: weakref.WeakSet[GuardedProcess] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for process in list(_living):
        process.end()


def _forget_all() -> None:
    for process in list(_living):
        process.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
