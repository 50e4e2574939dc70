"""The package's errors: a message of one or two sentences, and attributes that name the cause."""

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
    """The base class of this package's errors."""


@dataclass(eq=False)
class ConfigError(PGMonkeyError, ValueError):
    """A configuration is wrong.

    `file` is the configuration file (`None` for a dictionary), `key` the dotted name of the wrong
    key, and `hint` says what to do. None of them ever contains a secret.
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
    """A configuration refers to a variable or secret file that cannot be read.

    `variable` is the variable's name (`None` for a file).
    """

    variable: str | None = None


class CSVError(PGMonkeyError):
    """A CSV import or export failed.

    `file`, `line` and `column` say where, if that is known; `hint` says what to do. If the server
    refused something, `__cause__` is its psycopg error.
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
    """A handle was used after its `disconnect()`."""


class SandboxError(PGMonkeyError):
    """A test's transaction cannot do what was asked, or a handle was used outside of a test."""


class LibpqNotFoundError(PGMonkeyError, ImportError):
    """psycopg cannot be imported: it needs libpq, PostgreSQL's client library."""


def require_libpq() -> None:
    """Raise LibpqNotFoundError if psycopg cannot be imported because libpq is missing.

    Call it in the handler of an ImportError. If psycopg is not the cause, it does nothing.
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
