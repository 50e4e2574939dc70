"""The errors that users of the package see: one sentence each, and the culprit as attributes."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

__all__ = [
    "ConfigError",
    "EnvInterpolationError",
    "HandleClosedError",
    "PGMonkeyError",
    "SandboxError",
]


class PGMonkeyError(Exception):
    """Base of every error that this package raises by itself."""


@dataclass(eq=False)
class ConfigError(PGMonkeyError, ValueError):
    """A configuration is wrong.

    `file` is the file it came from (`None` for a dictionary), `key` the dotted name of the
    culprit, `hint` what to do about it. None of them ever holds a secret.
    """

    problem: str
    file: str | None = None
    key: str | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        # All of them, in order: an exception is unpickled by calling its class with its args.
        self.args = tuple(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part)
        text = f"{where}: {self.problem}" if where else self.problem
        return f"{text} ({self.hint})" if self.hint else text


@dataclass(eq=False)
class EnvInterpolationError(ConfigError):
    """A variable or a secret file that the configuration refers to cannot be had.

    `variable` names the variable (`None` for a file).
    """

    variable: str | None = None


class HandleClosedError(PGMonkeyError):
    """A handle is entered after its `disconnect()`."""


class SandboxError(PGMonkeyError):
    """Something was asked of a test's rolled-back transaction that it cannot give."""


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
