"""A line on the terminal that shows how far a copy is; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Progress"]

_INTERVAL = 0.1
_WIDTH = 24
_UNITS = ("B", "kB", "MB", "GB", "TB")


class Progress:
    """Shows bytes done, of how many where that is known."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what = what
        self._total = total
        self._start = self._shown = monotonic()
        self._active = sys.stderr.isatty()
        self._drawn = False

    def update(self, done: int) -> None:
        if not self._active:
            return
        now = monotonic()
        if now - self._shown >= _INTERVAL:
            self._shown = now
            self._drawn = True
            # Cleared to its end: the line before may have been longer.
            sys.stderr.write(f"\r{self._line(done, now - self._start)}\x1b[K")
            sys.stderr.flush()

    def _line(self, done: int, seconds: float) -> str:
        rate = f"{size(done)}  {size(done / seconds)}/s"
        if not self._total:
            return f"{self._what}  {rate}"
        share = min(done / self._total, 1.0)
        bar = "#" * round(share * _WIDTH)
        return f"{self._what}  [{bar:<{_WIDTH}}] {share:4.0%}  {rate}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def size(number: float) -> str:
    """Give bytes as people read them."""
    for unit in _UNITS:
        if number < 1000 or unit == _UNITS[-1]:
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
