"""The pytest side of a guardian: starts its process, asks it, and leaves it what is to be ended."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .server import ServerStartError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

__all__ = ["Guard"]

_ROOT: Final = Path(__file__).parents[3]


class Guard:
    """The process of a guardian, which is a module's class of this name."""

    guarded = "container"

    def __init__(
        self, guardian: ModuleType, *facts: object, path: Iterable[str | Path] = ()
    ) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._waiting = False
        self._process: subprocess.Popen[str] | None = _spawn(
            guardian.__name__, [str(fact) for fact in (self._owner, *facts)], path
        )
        self.pid = self._process.pid
        _living.add(self)

    @property
    def is_foreign(self) -> bool:
        """Whether this is a fork, which has nothing to end."""
        return os.getpid() != self._owner

    def ask(self, *request: Any) -> Any:
        """Have a method of the guardian called and give its result; raises ServerStartError."""
        with self._lock:
            process = self._process
            if process is None or process.stdin is None or process.stdout is None or self._waiting:
                raise self._error("it was stopped")
            self._waiting = True
            with contextlib.suppress(BrokenPipeError):  # then there is no answer either
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            self._waiting = False
        if not line:
            raise self._error("the process that guards it has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise self._error(answer["error"], taken=answer["taken"])
        return answer["result"]

    def _error(self, problem: str, *, taken: bool = False) -> ServerStartError:
        text = f"The {self.guarded} cannot run: {problem}."
        return ServerStartError(text, log=self.log(), taken=taken)

    def log(self) -> str:
        """Give the last lines of what is guarded, where they can be had."""
        return ""

    def tell(self, *request: Any) -> None:
        """Do the same where nothing depends on it: the guardian may have been killed."""
        with contextlib.suppress(ServerStartError):
            self.ask(*request)

    def leave(self) -> None:
        """Leave everything to the guardian, which this process no longer holds."""
        self._lock = threading.Lock()  # in a fork another thread may have held it
        if (process := self._close()) is not None:
            process.returncode = 0  # or its finalizer warns of a process still running

    at_exit = leave

    def end(self) -> bool:
        """Have everything ended, and wait for that; tells whether there was anything to end."""
        if self.is_foreign:
            self.leave()
        with self._lock:
            process = self._close()
            if process is None:
                return False
            if self._waiting:  # interrupted: it would first finish what it is at
                process.terminate()
            process.wait()
            return True

    def _close(self) -> subprocess.Popen[str] | None:
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process else ():
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return process


def _spawn(guardian: str, facts: list[str], path: Iterable[str | Path]) -> subprocess.Popen[str]:
    # The standard library comes first: nothing in a project can take the place of its modules.
    paths = [str(Path(directory).absolute()) for directory in [_ROOT, *path]]
    code = f"import sys; sys.path += {paths!r}; from {guardian} import Guardian"
    # Whatever changes what the programs of a server do is not for them.
    passed = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "PYTHON"))}
    return subprocess.Popen(
        [
            sys.executable,
            "-ISB" if sys.dont_write_bytecode else "-IS",
            "-c",
            f"{code}; Guardian(*sys.argv[1:]).live()",
            *facts,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        cwd=os.sep,
        env={**passed, "LC_ALL": "C", "TZ": "UTC"},
        start_new_session=True,
    )


_living: weakref.WeakSet[Guard] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    for guard in list(_living):
        guard.at_exit()


def _leave_all() -> None:
    for guard in list(_living):
        guard.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all)
