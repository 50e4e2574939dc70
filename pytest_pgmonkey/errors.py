"""The errors that users of the package see: one sentence each, and the culprit as attributes."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

__all__ = [
    "CSVError",
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


class CSVError(PGMonkeyError):
    """A CSV file cannot be imported, or a table or query cannot be exported.

    `file`, `line` and `column` say where, as far as it is known; `hint` says what to do about it.
    Where the server has refused something, its psycopg error is the `__cause__`.
    """

    def __init__(
        self,
        problem: str,
        hint: str | None = None,
        *,
        file: str | None = None,
        line: int | None = None,
        column: str | None = None,
    ) -> None:
        super().__init__(problem, hint)
        self.problem, self.hint = problem, hint
        self.file, self.line, self.column = file, line, column

    def __str__(self) -> str:
        return f"{self.problem}; {self.hint}" if self.hint else self.problem


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
