"""What the core uses of psycopg below its connections, and what is said where that has moved."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import psycopg

from ....errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

__all__ = ["error_from_result", "execute", "limited", "unsupported"]


def unsupported(moved: Iterable[str]) -> SandboxError:
    """Give the error that names what has moved."""
    return SandboxError(
        f"psycopg {psycopg.__version__} is not supported by this version of pytest-pgmonkey "
        f"(moved: {', '.join(sorted(moved))}); install a psycopg release that its "
        "documentation names, or update pytest-pgmonkey."
    )


try:
    from psycopg.errors import error_from_result
    from psycopg.generators import execute
except ImportError as error:
    # Without the path of the module, which is no help.
    raise unsupported([error.msg.partition(" (")[0]]) from error


def limited(steps: Generator[Any, Any, Any], seconds: float) -> Generator[Any, Any, Any]:
    """Run steps that wait for the server for no longer than this; raises TimeoutError.

    psycopg's `wait()` comes back every now and then with nothing.
    """
    deadline = time.monotonic() + seconds
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                steps.close()
                raise TimeoutError(f"the server has not answered for {seconds:g} seconds")
            wanted = steps.send(ready)
    except StopIteration as end:
        return end.value
