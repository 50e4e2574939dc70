"""The pytest side of the guardian: the process that removes the container if this one cannot."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
from typing import Any, Final

from . import guardian

__all__ = ["Watcher"]

_ISOLATED: Final = (sys.executable, "-I", "-S", "-E")


class Watcher:
    """The process that removes the container if this one cannot."""

    def __init__(self, attempt: str) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [*_ISOLATED, guardian.__file__, str(self._owner), attempt],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            cwd=os.sep,
            start_new_session=True,
        )
        atexit.register(self.leave)
        self.tell("path", [os.path.abspath(path) for path in sys.path])  # noqa: PTH100

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_foreign(self) -> bool:
        """Whether this is a fork, and the container not its own."""
        return os.getpid() != self._owner

    def tell(self, *words: Any) -> None:
        """Tell it something; where it was killed, nobody listens."""
        stdin = self._process.stdin
        if stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(json.dumps(words) + "\n")
                stdin.flush()

    def dismiss(self) -> None:
        """Let it end: the container is gone."""
        atexit.unregister(self.leave)
        self.tell("done")
        self._close()
        self._process.wait()

    def leave(self) -> None:
        """Leave the container to it."""
        atexit.unregister(self.leave)
        self._close()
        self._process.returncode = 0  # or its finalizer warns of a process still running

    def _close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
