"""The check that names what has moved in a psycopg release that is not supported."""

from __future__ import annotations

import pytest
from psycopg._connection_base import BaseConnection
from psycopg._preparing import PrepareManager

from pytest_pgmonkey import SandboxError
from pytest_pgmonkey.testing.sandbox import internals


def test_the_installed_release_is_supported() -> None:
    """The release that the tests run on passes the check."""
    internals.check_psycopg()


def test_what_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release without a method that the sandbox needs is refused, and the method named."""
    gone = {**internals._OPERATIONS, (PrepareManager, "_fetch"): ("statement", "query")}
    monkeypatch.setattr(internals, "_OPERATIONS", gone)
    with pytest.raises(SandboxError, match=r"moved: PrepareManager\._fetch"):
        internals.check_psycopg()


def test_a_renamed_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose SQL has another name is refused too."""
    other = {(BaseConnection, "_exec_command"): ("statement", "sql")}
    monkeypatch.setattr(internals, "_OPERATIONS", other)
    with pytest.raises(SandboxError, match=r"BaseConnection\._exec_command\(sql\)"):
        internals.check_psycopg()
