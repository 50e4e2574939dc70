"""Finds the tests that use the kit, what they ask of it, and which one runs now."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Final

import pytest

from ... import sources
from ...connection_type import CONNECTION_TYPES
from ..options import ISOLATIONS, SEQUENCES, OptionError, judge_types
from . import internals
from .configure import INTERCEPTION, OPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

ISOLATIONS_WANTED: Final = pytest.StashKey[Collection[str]]()
RESTART_WANTED: Final = pytest.StashKey[bool]()
"""Whether any test of the run asks for sequences as the template has them."""
MOVED: Final = pytest.StashKey[str]()
"""Of a test in isolation auto that needs a clone: why."""
CLONED: Final = pytest.StashKey[bool]()
"""Of a test that is run in a clone whatever it asks for."""
_MARKER: Final = "pgmonkey"
_PREFIX: Final = "pgmonkey"
_SHARED: Final = ("pgmonkey_module", "pgmonkey_class")
_TEST_FIXTURE: Final = "_pgmonkey_test"
_JOINING: Final = frozenset({"pgmonkey_dsn", "pgmonkey_url"})
_BEGINNING: Final = (
    "pgmonkey",
    "pgmonkey_connection",
    "pgmonkey_manager",
    "pgmonkey_normal",
    "pgmonkey_pool",
    "pgmonkey_async",
    "pgmonkey_async_pool",
)
_NO_DATA: Final = (
    "{} shares uncommitted data, which a clone does not have: use it with isolation='rollback', "
    "or make the data in the test"
)
_NATIVE: Final = {False: ("normal", "pool"), True: ("async", "async_pool")}


# What a test asks for: its marker beats the options


class _Wish:
    """What a test asks of the kit."""

    __slots__ = ("budget", "isolation", "problem", "restarts")

    def __init__(
        self,
        isolation: str,
        problem: str = "",
        budget: int | None = None,
        *,
        restarts: bool = False,
    ) -> None:
        self.isolation: Final = isolation
        self.restarts: Final = restarts
        self.problem: Final = problem
        self.budget: Final = budget


_WISH: Final = pytest.StashKey[_Wish]()


def _wish_of(item: pytest.Item) -> _Wish:
    """Read what a test asks for."""
    for marker in item.iter_markers(_MARKER):
        if problem := _marker_problem(marker):
            return _Wish("rollback", f"@pytest.mark.pgmonkey: {problem}")
    options = item.config.stash[OPTIONS]
    isolation = str(_marked(item, "isolation", options.isolation))
    shared, problem = shared_data_of(item), ""
    if shared and isolation == "auto":
        isolation = "rollback"
    elif shared and isolation == "clone":
        problem = _NO_DATA.format(shared)
    restarts = _marked(item, "sequences", options.sequences) == "restart"
    return _Wish(isolation, problem, _marked(item, "max_queries", None), restarts=restarts)


def _marked(item: pytest.Item, keyword: str, default: Any) -> Any:
    """Give the value of the nearest marker with this keyword."""
    for marker in item.iter_markers(_MARKER):
        if keyword in marker.kwargs:
            return marker.kwargs[keyword]
    return default


def _marker_problem(marker: pytest.Mark) -> str:
    unknown = set(marker.kwargs) - {"isolation", "types", "max_queries", "sequences"}
    if marker.args or unknown:
        what = ", ".join(sorted(unknown)) or "a positional argument"
        return f"takes isolation=, types=, max_queries= and sequences=, not {what}"
    budget = marker.kwargs.get("max_queries", 0)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        return f"max_queries={budget!r} is no number of statements: give 0 or more"
    isolation = marker.kwargs.get("isolation", "rollback")
    if isolation not in ISOLATIONS:
        return f"isolation {isolation!r} is not one of {', '.join(ISOLATIONS)}"
    sequences = marker.kwargs.get("sequences", "count")
    if sequences not in SEQUENCES:
        return f"sequences {sequences!r} is not one of {', '.join(SEQUENCES)}"
    return ""


def budget_of(item: pytest.Item) -> int | None:
    """Give how many queries the call of a test may run, if its marker says so."""
    wish = item.stash.get(_WISH, None)
    return wish.budget if wish is not None else None


def shared_data_of(item: pytest.Item) -> str:
    """Give the fixture whose data a test shares with others, if any; no clone has that data."""
    return next((name for name in getattr(item, "fixturenames", ()) if name in _SHARED), "")


# Which tests use the kit


def uses_kit(item: pytest.Item) -> bool:
    """Whether a test asks for a database: by fixture or marker, or as all of the run's."""
    return _is_marked(item) or any(
        name.startswith(_PREFIX) and _is_ours(name, internals.fixtures_of(item).get(name, ()))
        for name in getattr(item, "fixturenames", ())
    )


def _is_marked(item: pytest.Item) -> bool:
    """Whether a test has the marker; with the option `env` every test counts."""
    return item.get_closest_marker(_MARKER) is not None or bool(item.config.stash[OPTIONS].env)


def _is_ours(name: str, definitions: Sequence[Any]) -> bool:
    """Whether a fixture is the plugin's: a project may have its own fixture of that name."""
    for definition in reversed(definitions):
        if definition.func.__module__ == f"{__package__}.fixtures":
            return True
        if name not in definition.argnames:
            return False
    return False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    users = [item for item in items if uses_kit(item)]
    for item in users:
        _prepare_item(item)
    config.stash[ISOLATIONS_WANTED] = {item.stash[_WISH].isolation for item in users}
    config.stash[RESTART_WANTED] = any(item.stash[_WISH].restarts for item in users)
    config.stash[INTERCEPTION].collected()
    options = config.stash[OPTIONS]
    if options.intercept == "auto" and not users and not options.given:
        sources.interceptor = None


def _prepare_item(item: pytest.Item) -> None:
    item.stash[_WISH] = _wish_of(item)
    backend = str(getattr(getattr(item, "callspec", None), "params", {}).get("anyio_backend", ""))
    if "trio" in backend:
        item.add_marker(
            pytest.mark.skip(reason="psycopg's async connections are asyncio's, not trio's")
        )
    names = getattr(item, "fixturenames", None)
    if names is not None:
        # Asked for only at set-up; else pytest-rerunfailures does not forget that the database
        # could not be prepared.
        internals.add_fixture(item, "pgmonkey_database")
        _put_first(item, names)
        if item.config.stash[OPTIONS].env and "pgmonkey_database" not in names:
            # Clients may write while a class or a module is set up.
            names.insert(0, "pgmonkey_database")


def _put_first(item: pytest.Item, names: list[str]) -> None:
    """Begin the test before any other fixture of function scope, so that it ends after them."""
    beginning = next((name for name in names if name in _BEGINNING), None)
    if beginning is not None:
        names.remove(beginning)
    elif _is_marked(item) or not _JOINING.isdisjoint(names):
        beginning = _TEST_FIXTURE
    else:
        return  # It asks for the server or the database only.
    known = internals.fixtures_of(item)
    position = len(names)
    for index, name in enumerate(names):
        found = known.get(name)
        if found and found[-1].scope == "function":
            position = index
            break
    names.insert(position, beginning)


# The fixture pgmonkey_connection


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = "pgmonkey_connection"
    if name not in metafunc.fixturenames or _is_parametrized(metafunc, name):
        return
    types = _types_of(metafunc)
    if types == ("native",):
        types = _NATIVE[is_async(metafunc.function)]
    elif types == ("all",):
        types = CONNECTION_TYPES
    metafunc.parametrize(name, types, indirect=True, ids=types)


def _is_parametrized(metafunc: pytest.Metafunc, name: str) -> bool:
    return any(
        name in re.split(r"\s*,\s*", mark.args[0])
        if isinstance(mark.args[0], str)
        else name in mark.args[0]
        for mark in metafunc.definition.iter_markers("parametrize")
        if mark.args
    )


def _types_of(metafunc: pytest.Metafunc) -> tuple[str, ...]:
    wanted = _marked(metafunc.definition, "types", metafunc.config.stash[OPTIONS].types)
    if isinstance(wanted, str):
        wanted = wanted.replace(",", " ").split()
    origin = "@pytest.mark.pgmonkey(types=…)"
    try:
        if not isinstance(wanted, Iterable):
            raise OptionError(f"{origin}: {wanted!r} is no name of a type, nor a list of them")
        return judge_types(tuple(map(str, wanted)), origin)
    except OptionError as error:
        pytest.fail(f"{metafunc.definition.nodeid}: {error}", pytrace=False)


def is_async(function: Any) -> bool:
    """Whether a test function is a coroutine, also under hypothesis's wrapper."""
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)


# The test that runs now

_running: pytest.Item
_isolation: str
_needs_clone: bool
_restarts: bool


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _running, _isolation, _needs_clone, _restarts
    _running = item
    _needs_clone = MOVED in item.stash
    # Decided at collection: this is paid for by every test.
    wish = item.stash.get(_WISH, None)
    if CLONED in item.stash:
        wish = _Wish("clone")
    if wish is None:  # It may ask by getfixturevalue().
        options = item.config.stash[OPTIONS]
        _isolation, _restarts = options.isolation, options.sequences == "restart"
        return
    if wish.problem:
        pytest.fail(wish.problem, pytrace=False)
    _isolation, _restarts = wish.isolation, wish.restarts


def isolation_of_running_test() -> tuple[str, bool, bool]:
    """Give the isolation that the test being set up asks for, and whether auto is to be clone.

    And whether it is to find sequences as the template has them.
    """
    return _isolation, _needs_clone, _restarts


def restarts_sequences() -> bool:
    """Whether the test being set up should find sequences as the template has them."""
    return _restarts


def current_request() -> pytest.FixtureRequest:
    """Give the fixture request of the test that is being set up."""
    return internals.request_of(_running)
