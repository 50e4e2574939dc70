"""What is said of a psycopg release that has moved what the sandbox relies on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

from ...errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterable


def unsupported(moved: Iterable[str]) -> SandboxError:
    """Give the error that names what has moved."""
    return SandboxError(
        f"psycopg {psycopg.__version__} is not supported by this version of pytest-pgmonkey "
        f"(moved: {', '.join(sorted(moved))}); install a psycopg release that its "
        "documentation names, or update pytest-pgmonkey."
    )
