"""The private names of pytest that the plugin uses; no other module uses any."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Attributes of pytest's functions, by the method that sets them.
_SET_BY: Final = {"__init__": "_fixtureinfo", "_initrequest": "_request"}
_IN_FIXTURES: Final = {"FixtureManager": "getfixturedefs", "FuncFixtureInfo": "name2fixturedefs"}


def unsupported() -> str:
    """Tell what the installed pytest has moved, and what to do; empty where all is in place."""
    moved = [
        f"Function.{name}"
        for method, name in _SET_BY.items()
        if name not in _names_in(getattr(pytest.Function, method, None))
    ]
    if "_fixturemanager" not in pytest.Session.__annotations__:
        moved.append("Session._fixturemanager")
    if "_report_sections" not in _names_in(pytest.Item.__init__):
        moved.append("Item._report_sections")
    fixtures = sys.modules.get("_pytest.fixtures")
    for owner, name in _IN_FIXTURES.items():
        if not hasattr(getattr(fixtures, owner, None), name):
            moved.append(f"{owner}.{name}")
    if not moved:
        return ""
    return (
        f"pytest {pytest.__version__} is not supported by this version of pytest-pgmonkey "
        f"(moved: {', '.join(moved)}); install an earlier pytest, update pytest-pgmonkey, or "
        "leave it out with -p no:pgmonkey"
    )


def _names_in(method: Any) -> Sequence[str]:
    return getattr(getattr(method, "__code__", None), "co_names", ())


def fixtures_of(item: pytest.Item) -> Mapping[str, Sequence[Any]]:
    """Give the definitions of the fixtures that an item names, innermost last."""
    info = getattr(item, "_fixtureinfo", None)
    return info.name2fixturedefs if info is not None else {}


def add_fixture(item: Any, name: str) -> None:
    """Count a fixture among those that an item has, though it does not name it."""
    known = item._fixtureinfo.name2fixturedefs
    if name not in known:
        known[name] = item.session._fixturemanager.getfixturedefs(name, item) or ()


def renew(item: Any) -> Callable[[], None]:
    """Let an item that has run be set up as if it had not; nothing of its report is left.

    Gives what brings the report back.
    """
    sections, failures = list(item._report_sections), getattr(item, "_excinfo", None)

    def restore() -> None:
        item._report_sections[:] = sections
        _set_failures(item, failures)

    item._initrequest()
    item._report_sections.clear()
    _set_failures(item, None)
    return restore


def _set_failures(item: Any, failures: Any) -> None:
    if failures is not None:
        item._excinfo = failures
    else:
        item.__dict__.pop("_excinfo", None)  # of a unittest.TestCase, which adds to what it finds


def failure_of(item: Any) -> BaseException | None:
    """Give how a test of unittest has failed, whose errors are not raised."""
    found = getattr(item, "_excinfo", None)
    return found[-1].value if found else None


def request_of(item: Any) -> pytest.FixtureRequest:
    """Give the fixture request of an item that is being set up."""
    return item._request  # type: ignore[no-any-return]
