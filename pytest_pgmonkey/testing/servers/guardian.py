"""A small process that ends what pytest has started, whatever becomes of pytest.

`guard.py` starts it, isolated, and asks it over a pipe. A request is a JSON array on a line: the
name of a method `do_…` and its arguments. Its answer is one JSON object. When pytest closes the
pipe or is gone, all that it guards is ended: a normal end and a SIGKILL of pytest take one path.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

PARENT_POLL = 0.25
STAY_POLL = 1.0


class Guardian:
    """Waits for the end of pytest, or of a run that it was published to, and then cleans up."""

    def __init__(self, parent: str) -> None:
        self._parent = int(parent)
        self._run = 0
        self._lock = threading.Lock()
        self._ended = False

    def do_publish(self, pid: int) -> None:
        """Live from now on as long as that process, the controller of a run, does."""
        self._run = pid

    def is_kept(self) -> bool:
        """Tell whether a database of a failed test is kept, for which everything has to stay."""
        raise NotImplementedError

    def clean_up(self) -> None:
        """End and remove everything; called once."""
        raise NotImplementedError

    def live(self) -> None:
        """Do all that a guardian does, from its start to its end."""
        _set_signals(lambda *_: sys.exit(0))
        try:
            if os.name != "nt":
                if os.getppid() != self._parent:
                    return
                self._watching = threading.Thread(target=self._watch, daemon=True)
                self._watching.start()
            self._serve()
        finally:
            _set_signals(signal.SIG_IGN)
            self._end()
            _detach_output()

    def _watch(self) -> None:
        """End everything once pytest is gone, also where a fork of it holds the pipe open."""
        while is_alive(self._run) if self._run else os.getppid() == self._parent:
            time.sleep(PARENT_POLL)
        self._stay()
        self._end()
        os._exit(0)

    def _serve(self) -> None:
        """Answer requests until pytest closes the pipe, and wait for the run's end if there is one.

        The watching thread ends this process then.
        """
        # Pytest may be killed within a line, or before it has read an answer.
        with contextlib.suppress(BrokenPipeError, json.JSONDecodeError):
            for line in sys.stdin:
                verb, *arguments = json.loads(line)
                try:
                    answer = {"result": getattr(self, f"do_{verb}")(*arguments)}
                except OSError as error:
                    answer = {"error": str(error), "taken": isinstance(error, FileExistsError)}
                print(json.dumps(answer), flush=True)  # noqa: T201 - read by pytest
        if self._run:
            self._watching.join()
        self._stay()

    def _stay(self) -> None:
        while self.is_kept():
            time.sleep(STAY_POLL)

    def _end(self) -> None:
        """Clean up once, whichever thread asks first."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self.clean_up()


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that waits for its parent to notice its end does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123 - it starts without pathlib
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return os.name == "nt" or not os.path.exists("/proc/self/stat")  # noqa: PTH110


def _set_signals(handler: Any) -> None:
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def _detach_output() -> None:
    """Let the interpreter's last flush of stdout go nowhere, as its reader may be gone."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
