"""A line on the terminal that shows how far a copy is; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_INTERVAL = 0.1
_WIDTH = 24
_UNITS = ("B", "kB", "MB", "GB", "TB")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Give a function that shows bytes done, of how many where that is known."""
    start = shown = monotonic()
    active = sys.stderr.isatty()

    def update(done: int, total: int | None) -> None:
        nonlocal shown
        if active and (now := monotonic()) - shown >= _INTERVAL:
            shown = now
            # Cleared to its end: the line before may have been longer.
            sys.stderr.write(f"\r{_line(what, done, total, now - start)}\x1b[K")
            sys.stderr.flush()

    try:
        yield update
    finally:
        if shown != start:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _line(what: str, done: int, total: int | None, seconds: float) -> str:
    rate = f"{_size(done)}  {_size(done / seconds)}/s"
    if not total:
        return f"{what}  {rate}"
    share = min(done / total, 1.0)
    bar = "#" * round(share * _WIDTH)
    return f"{what}  [{bar:<{_WIDTH}}] {share:4.0%}  {rate}"


def _size(number: float) -> str:
    power = 0
    while number >= 1000 and _UNITS[power + 1 :]:
        number /= 1000
        power += 1
    return f"{number:.{min(power, 1)}f} {_UNITS[power]}"
