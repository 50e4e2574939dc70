"""What is said where psycopg finds no libpq: importing it fails, and the reason is a page long."""

from __future__ import annotations

import os

from .errors import PGMonkeyError


class LibpqNotFoundError(PGMonkeyError, ImportError):
    """psycopg cannot be imported: it needs libpq, PostgreSQL's client library."""


def require_libpq() -> None:
    """Raise LibpqNotFoundError where psycopg cannot be imported for want of a libpq.

    Meant for the handler of an ImportError: where psycopg is not the cause, nothing is raised.
    """
    try:
        import psycopg.pq  # noqa: F401
    except ImportError:
        chosen = os.environ.get("PSYCOPG_IMPL")
        only = f" (PSYCOPG_IMPL={chosen} admits no other)" if chosen else ""
        raise LibpqNotFoundError(
            "psycopg finds no libpq, PostgreSQL's client library: install "
            '"pytest-pgmonkey[binary]", which brings one, or "pytest-pgmonkey[c]" or the '
            f"system's libpq (Debian: libpq5){only}"
        ) from None
