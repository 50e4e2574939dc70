"""What the core uses of psycopg below its connections, and what is said where that has moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

from ....errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["error_from_result", "execute", "unsupported"]


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
