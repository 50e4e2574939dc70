"""SIGTERM and SIGHUP end a command as Ctrl-C does, so that nothing half-written stays behind."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Terminated", "terminable"]


class Terminated(KeyboardInterrupt):
    """A signal asks the command to end; psycopg cancels what runs, as it does on Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, _frame: object) -> None:
    raise Terminated(number)


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` in the block when the process is asked to end."""
    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    # nohup has a command ignore SIGHUP, and a program that calls `main()` may have its own way.
    ours = [number for number in numbers if number and signal.getsignal(number) == signal.SIG_DFL]
    if current_thread() is not main_thread():
        ours = []
    for number in ours:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
