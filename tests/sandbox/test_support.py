"""The check that names what has moved in a psycopg release that is not supported."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import pytest
from psycopg._connection_base import BaseConnection
from psycopg._cursor_base import BaseCursor
from psycopg._preparing import PrepareManager

from pytest_pgmonkey import SandboxError
from pytest_pgmonkey.testing.sandbox.core import driver
from pytest_pgmonkey.testing.sandbox.psycopg_door import internals

if TYPE_CHECKING:
    from types import ModuleType


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


def test_what_else_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods and attributes that no operation is known by are looked for as well."""
    monkeypatch.setattr(internals, "_NAMES", {BaseCursor: ("_gone",)})
    monkeypatch.setattr(internals, "_PREPARED_ATTRIBUTES", ("_names", "_lost"))
    with pytest.raises(SandboxError, match=r"moved: BaseCursor\._gone, PrepareManager\._lost"):
        internals.check_psycopg()


@pytest.mark.parametrize(
    ("module", "gone"),
    [
        (driver, "generators"),
        (internals, "_connection_base"),
        (internals, "_cursor_base"),
        (internals, "_preparing"),
        (internals, "pq.misc"),
        (internals, "transaction"),
    ],
)
def test_a_module_that_is_gone_is_named(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, gone: str
) -> None:
    """A release without a module that the sandbox needs is refused, and the module named."""
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setitem(sys.modules, f"psycopg.{gone}", None)
    with pytest.raises(SandboxError, match=rf"is not supported .*moved: .*psycopg\.{gone}"):
        importlib.import_module(module.__name__)


def test_a_name_that_a_module_has_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module without a class that the sandbox needs is refused too."""
    monkeypatch.delitem(sys.modules, internals.__name__)
    monkeypatch.delattr("psycopg._preparing.PrepareManager")
    with pytest.raises(SandboxError, match=r"moved: cannot import name 'PrepareManager'"):
        importlib.import_module(internals.__name__)
