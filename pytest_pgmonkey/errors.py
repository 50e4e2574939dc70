"""The errors that users of the package see: one sentence each, and the culprit as attributes."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "EnvInterpolationError",
    "HandleClosedError",
    "PGMonkeyError",
    "SandboxError",
]


class PGMonkeyError(Exception):
    """Base of every error that this package raises by itself."""


class ConfigError(PGMonkeyError, ValueError):
    """A configuration is wrong.

    `file` is the file it came from (`None` for a dictionary), `key` the dotted name of the
    culprit, `hint` what to do about it. None of them ever holds a secret.
    """

    def __init__(
        self,
        problem: str,
        file: str | None = None,
        key: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = file
        self.key = key
        self.hint = hint
        super().__init__(problem, file, key, hint)

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part)
        text = f"{where}: {self.problem}" if where else self.problem
        return f"{text} ({self.hint})" if self.hint else text


class EnvInterpolationError(ConfigError):
    """A variable or a secret file that the configuration refers to cannot be had.

    `variable` names the variable (`None` for a file).
    """

    def __init__(
        self,
        problem: str,
        file: str | None = None,
        key: str | None = None,
        hint: str | None = None,
        variable: str | None = None,
    ) -> None:
        super().__init__(problem, file, key, hint)
        self.variable = variable
        # All of them, in order: an exception is unpickled by calling its class with its args.
        self.args = (problem, file, key, hint, variable)


class HandleClosedError(PGMonkeyError):
    """A handle is entered after its `disconnect()`."""


class SandboxError(PGMonkeyError):
    """Something was asked of a test's rolled-back transaction that it cannot give."""
