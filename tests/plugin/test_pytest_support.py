"""The check that names what has moved in a pytest release that is not supported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_pgmonkey.testing.plugin import internals

if TYPE_CHECKING:
    from collections.abc import Callable

MOVED = """
    from pytest_pgmonkey.testing.plugin import internals

    internals._SET_BY = {"__init__": "_gone"}
"""
MOVED_IN_JUNIT = """
    from pytest_pgmonkey.testing.plugin import internals

    internals._IN_JUNIT = {"LogXML": "gone"}
"""


def test_the_installed_release_is_supported() -> None:
    """The release that the tests run on passes the check."""
    assert internals.unsupported(junit=True) == ""


def test_what_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every private name is looked for where pytest has it."""
    monkeypatch.setattr(internals, "_SET_BY", {"__init__": "_lost", "_gone": "_request"})
    monkeypatch.setattr(internals, "_IN_FIXTURES", {"FixtureManager": "find", "Gone": "name"})
    monkeypatch.setattr(pytest.Session, "__annotations__", {})
    monkeypatch.setattr(internals, "_IN_JUNIT", {"LogXML": "add", "_NodeReporter": "append drop"})
    moved = "Function._lost, Function._request, Session._fixturemanager, FixtureManager.find"
    assert f"(moved: {moved}, Gone.name)" in internals.unsupported()
    in_junit = "LogXML.add, _NodeReporter.drop"
    assert f"(moved: {moved}, Gone.name, {in_junit})" in internals.unsupported(junit=True)


def test_what_has_moved_in_the_runner_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the teardown are set by functions, or are theirs."""
    monkeypatch.setattr(internals, "_IN_RUNNER", "Gone")
    assert "(moved: Gone.stack, Gone.teardown_exact)" in internals.unsupported()
    monkeypatch.setitem(sys.modules, "_pytest.runner", None)
    moved = "Session._setupstate, Gone.stack, Gone.teardown_exact"
    assert f"(moved: {moved})" in internals.unsupported()


def test_a_project_that_uses_the_kit_is_told(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The run ends before any test, with one sentence."""
    pytester.makeconftest(MOVED)
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("ERROR: pytest * is not supported *(moved: Function._gone)*")


def test_a_project_that_does_not_use_it_is_left_alone(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The package may be installed for something else."""
    pytester.makeconftest(MOVED)
    pytester.makepyfile("def test_it(): pass")
    run().assert_outcomes(passed=1)


def test_only_a_run_that_writes_junit_xml_needs_its_names(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The others do not look for them."""
    pytester.makeconftest(MOVED_IN_JUNIT)
    pytester.makepyfile("def test_it(pgmonkey): pass")
    run().assert_outcomes(passed=1)
    result = run("--junitxml=it.xml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("ERROR: pytest * is not supported *(moved: LogXML.gone)*")
