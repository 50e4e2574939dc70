"""What a test asks of the kit, by its marker or by the options, and which test runs now."""

from __future__ import annotations

from typing import Any, Final

import pytest

from ..options import ISOLATIONS
from . import internals
from .configure import OPTIONS

MARKER: Final = "pgmonkey"
_SHARED: Final = ("pgmonkey_module", "pgmonkey_class")

_running: pytest.Item
_isolation: str


class Wish:
    """What a test asks of the kit."""

    __slots__ = ("isolation", "problem")

    def __init__(self, isolation: str, problem: str = "") -> None:
        self.isolation: Final = isolation
        self.problem: Final = problem


WISH: Final = pytest.StashKey[Wish]()


def wish_of(item: pytest.Item) -> Wish:
    """Read what a test asks for."""
    for marker in item.iter_markers(MARKER):
        if problem := _marker_problem(marker):
            return Wish("rollback", f"@pytest.mark.pgmonkey: {problem}")
    isolation = str(marked(item, "isolation", item.config.stash[OPTIONS].isolation))
    return Wish(isolation, _shared_data_problem(item) if isolation == "clone" else "")


def marked(item: pytest.Item, keyword: str, default: Any) -> Any:
    """Give what the nearest marker with a keyword says: others leave it as it is."""
    for marker in item.iter_markers(MARKER):
        if keyword in marker.kwargs:
            return marker.kwargs[keyword]
    return default


def _marker_problem(marker: pytest.Mark) -> str:
    unknown = set(marker.kwargs) - {"isolation", "types"}
    if marker.args or unknown:
        what = ", ".join(sorted(unknown)) or "a positional argument"
        return f"takes isolation= and types=, not {what}"
    isolation = marker.kwargs.get("isolation", "rollback")
    if isolation not in ISOLATIONS:
        return f"isolation {isolation!r} is not one of rollback, clone"
    return ""


def _shared_data_problem(item: pytest.Item) -> str:
    for name in getattr(item, "fixturenames", ()):
        if name in _SHARED:
            return (
                f"{name} shares uncommitted data, which a clone does not have: use it with "
                "isolation='rollback', or make the data in the test"
            )
    return ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _running, _isolation
    _running = item
    # Decided at collection: this is paid for by every test.
    wish = item.stash.get(WISH, None)
    if wish is None:  # It may ask by getfixturevalue().
        _isolation = item.config.stash[OPTIONS].isolation
        return
    if wish.problem:
        pytest.fail(wish.problem, pytrace=False)
    _isolation = wish.isolation


def isolation_of_running_test() -> str:
    """Give the isolation that the test which is being set up asks for."""
    return _isolation


def current_request() -> pytest.FixtureRequest:
    """Give the fixture request of the test that is being set up."""
    return internals.request_of(_running)
