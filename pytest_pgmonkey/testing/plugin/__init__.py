"""The pytest plugin: options, marker, report header, and which tests get a database.

Every pytest run of every project that has the package installed imports this module: nothing
heavy may be imported here before a test asks for a database.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from ... import sources
from ...connection_type import CONNECTION_TYPES
from ...errors import PGMonkeyError
from ...libpq import require_libpq
from ..interception import Interception, Phase
from ..options import (
    ISOLATIONS,
    OPTIONS,
    Option,
    OptionError,
    Options,
    environment,
    judge_types,
    resolve,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from ..kit import Kit
    from ..prepared import Database
    from ..servers.worker import Worker

pytest_plugins = ["pytest_pgmonkey.testing.plugin.fixtures"]

_OPTIONS: Final = pytest.StashKey[Options]()
_INTERCEPTION: Final = pytest.StashKey[Interception]()
_KIT: Final = pytest.StashKey["Kit"]()
_RUN: Final = pytest.StashKey[dict[str, str | int]]()
_WISH: Final = pytest.StashKey["_Wish"]()
_MARKER: Final = "pgmonkey"
_PREFIX: Final = "pgmonkey"
_TEST_FIXTURE: Final = "_pgmonkey_test"
_BEGINNING: Final = (
    "pgmonkey",
    "pgmonkey_connection",
    "pgmonkey_manager",
    "pgmonkey_normal",
    "pgmonkey_pool",
    "pgmonkey_async",
    "pgmonkey_async_pool",
)
_SHARED: Final = ("pgmonkey_module", "pgmonkey_class")
_NATIVE: Final = {False: ("normal", "pool"), True: ("async", "async_pool")}

_running: pytest.Item | None = None


# Options


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pgmonkey", "PostgreSQL databases for tests (pytest-pgmonkey)")
    for option in OPTIONS:
        _add_option(group, option)
        parser.addini(option.ini, option.help, type=option.ini_type, default=None)  # type: ignore[arg-type]


def _add_option(group: Any, option: Option) -> None:
    dest = option.ini + "_option"
    if option.kind == "flag":
        group.addoption(option.flag, dest=dest, action="store_true", default=None, help=option.help)
    elif option.kind == "lines":
        group.addoption(
            option.flag, dest=dest, action="append", default=None, help=option.help, metavar="X"
        )
    else:
        group.addoption(option.flag, dest=dest, default=None, help=_help(option), metavar="X")


def _help(option: Option) -> str:
    choices = f": {', '.join(option.choices)}" if option.choices else ""
    default = f" (default: {option.default})" if option.default else ""
    return f"{option.help}{choices}{default}".replace("%", "%%")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # A conftest may import the application, which may ask for its handles at once.
    _install(early_config, early_config.known_args_namespace)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "pgmonkey(isolation='rollback', types='native'): give the test a PostgreSQL database "
        "that is rolled back, without naming a fixture, or with other settings than the run's.",
    )
    if _INTERCEPTION not in config.stash:
        _install(config, config.option)
    if config.stash[_OPTIONS].keep == "failed":
        config.pluginmanager.register(_FailedTests(), "pgmonkey-keep")


def _install(config: pytest.Config, arguments: Any) -> None:
    """Decide the options, and stand between the application's handles and their servers."""
    try:
        options = resolve(
            lambda option: getattr(arguments, option.ini + "_option", None),
            lambda option: config.getini(option.ini),
            environment(),
            rootdir=config.rootpath,
            called_from=config.invocation_params.dir,
        )
    except OptionError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[_OPTIONS] = options
    interception = Interception(options.map, everything=options.intercept != "false")
    interception.used = lambda: _mentions_kit(config)
    config.stash[_INTERCEPTION] = interception
    sources.interceptor = interception
    # Where loading a conftest fails, pytest_unconfigure is not called.
    config.add_cleanup(lambda: _uninstall(interception))


def _uninstall(interception: Interception) -> None:
    if sources.interceptor is interception:
        sources.interceptor = None


def _mentions_kit(config: pytest.Config) -> bool:
    """Whether the tests being collected will use the kit, as far as their text tells.

    Asked only when application code enters a handle while it is imported.
    """
    if config.stash[_OPTIONS].given or config.stash[_OPTIONS].intercept == "true":
        return True
    arguments = getattr(config, "args", None) or config.known_args_namespace.file_or_dir
    for argument in arguments or [str(config.rootpath)]:
        path = Path(argument.split("::", 1)[0])
        files = path.rglob("*.py") if path.is_dir() else [path, *path.parent.glob("conftest.py")]
        if any(_mentions(file) for file in files):
            return True
    return False


def _mentions(file: Path) -> bool:
    if not (file.name.startswith("test_") or file.name.endswith(("_test.py", "conftest.py"))):
        return False
    try:
        return re.search(r"\bpgmonkey(_\w+)?\b(?!\.yaml)", file.read_text("utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        return False


# Which tests use the kit


def uses_kit(item: pytest.Item) -> bool:
    """Whether a test asks for a database, by fixture or marker."""
    info = getattr(item, "_fixtureinfo", None)
    known = info.name2fixturedefs if info is not None else {}
    return item.get_closest_marker(_MARKER) is not None or any(
        name.startswith(_PREFIX) and _is_ours(name, known.get(name, ()))
        for name in getattr(item, "fixturenames", ())
    )


def _is_ours(name: str, definitions: Sequence[Any]) -> bool:
    """Whether a fixture is the plugin's: a project may have one of its own by that name."""
    for definition in reversed(definitions):
        if definition.func.__module__ == f"{__package__}.fixtures":
            return True
        if name not in definition.argnames:
            return False
    return False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    used = False
    interception = config.stash[_INTERCEPTION]
    for item in items:
        if uses_kit(item):
            used = True
            _prepare_item(item)
            interception.clones_wanted |= item.stash[_WISH].isolation == "clone"
    interception.phase = Phase.OUTSIDE
    options = config.stash[_OPTIONS]
    if options.intercept == "auto" and not used and not options.given:
        sources.interceptor = None


def _prepare_item(item: pytest.Item) -> None:
    item.stash[_WISH] = _wish(item)
    backend = str(getattr(getattr(item, "callspec", None), "params", {}).get("anyio_backend", ""))
    if "trio" in backend:
        item.add_marker(
            pytest.mark.skip(reason="psycopg's async connections are asyncio's, not trio's")
        )
    names = getattr(item, "fixturenames", None)
    if names is not None:
        _name_database(item)
        _put_first(item, names)


def _name_database(item: Any) -> None:
    """Count the database, asked for only at set-up, among the fixtures that the test has.

    Else pytest-rerunfailures does not forget that it could not be prepared.
    """
    known = item._fixtureinfo.name2fixturedefs
    if "pgmonkey_database" not in known:
        manager = item.session._fixturemanager
        known["pgmonkey_database"] = manager.getfixturedefs("pgmonkey_database", item) or ()


def _put_first(item: pytest.Item, names: list[str]) -> None:
    """Begin the test before any other fixture of function scope, so that it ends after them."""
    beginning = next((name for name in names if name in _BEGINNING), None)
    if beginning is not None:
        names.remove(beginning)
    elif item.get_closest_marker(_MARKER) is not None:
        beginning = _TEST_FIXTURE
    else:
        return  # It asks for the server or the database only.
    definitions = getattr(item, "_fixtureinfo", None)
    known = definitions.name2fixturedefs if definitions is not None else {}
    position = len(names)
    for index, name in enumerate(names):
        found = known.get(name)
        if found and found[-1].scope == "function":
            position = index
            break
    names.insert(position, beginning)


# pgmonkey_connection


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
    wanted = _marked(metafunc.definition, "types", metafunc.config.stash[_OPTIONS].types)
    if isinstance(wanted, str):
        wanted = wanted.replace(",", " ").split()
    origin = "@pytest.mark.pgmonkey(types=…)"
    try:
        if not isinstance(wanted, Iterable):
            raise OptionError(f"{origin}: {wanted!r} is no name of a type, nor a list of them")
        return judge_types(tuple(map(str, wanted)), origin)
    except OptionError as error:
        pytest.fail(f"{metafunc.definition.nodeid}: {error}", pytrace=False)


def _marked(item: pytest.Item, keyword: str, default: Any) -> Any:
    """Give what the nearest marker with a keyword says: others leave it as it is."""
    for marker in item.iter_markers(_MARKER):
        if keyword in marker.kwargs:
            return marker.kwargs[keyword]
    return default


def is_async(function: Any) -> bool:
    """Whether a test function is a coroutine, also under hypothesis's wrapper."""
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)


# The kit of this process


def kit_of(config: pytest.Config) -> Kit:
    """Give the kit of this process; made at its first use, and with it all that is heavy."""
    kit = config.stash.get(_KIT, None)
    if kit is None:
        try:
            from ..kit import Kit
        except ImportError:
            require_libpq()
            raise
        interception = config.stash[_INTERCEPTION]
        # A doctest or getfixturevalue() may ask although no collected test said that it would.
        sources.interceptor = interception
        kit = config.stash[_KIT] = Kit(
            config.stash[_OPTIONS], interception, partial(_stop, config), _worker(config)
        )
    return kit


def prepare(config: pytest.Config, steps: Any) -> Database:
    """Prepare the database of this process; the server starts while the kit is imported."""
    from ..databases.schema import listed

    steps = listed(steps)
    if _KIT in config.stash:
        return kit_of(config).prepare(steps)
    from ..servers.launch import launch

    launched = launch(config.stash[_OPTIONS], _worker(config), steps)
    try:
        return kit_of(config).prepare(steps, launched)
    except BaseException:
        if launched is not None:
            launched.stop()
        raise


def schema_of(config: pytest.Config) -> list[Any]:
    """Give the schema steps that the options name."""
    return list(config.stash[_OPTIONS].schema)


def _worker(config: pytest.Config) -> Worker | None:
    workerinput = getattr(config, "workerinput", None)
    if workerinput is None:
        return None
    from ..servers.worker import worker_of

    return worker_of(workerinput)


def _stop(config: pytest.Config, reason: str) -> None:
    session = config.pluginmanager.get_plugin("session")
    if session is not None:
        session.shouldstop = reason


@contextmanager
def show_errors() -> Iterator[None]:
    """Fail with the message of our own errors alone: our stack would only hide it."""
    try:
        yield
    except Exception as error:
        raise _shown(error) from None


def _shown(error: Exception) -> BaseException:
    if isinstance(error, PGMonkeyError) or type(error).__module__.startswith("psycopg"):
        return pytest.fail.Exception(f"pgmonkey: {error}", pytrace=False)
    return error


def begin(kit: Kit) -> None:
    """Begin a test in the isolation that it asks for."""
    if kit.simple:
        kit.begin()  # which cannot fail then, and is paid for by every test
    else:
        with show_errors():
            kit.begin()


def settle(kit: Kit) -> None:
    """End a test: roll it back, and fail it for what went wrong unseen."""
    try:
        failures, refusals = kit.end()
    except Exception as error:
        from ..prepared import SpoiledError

        if isinstance(error, SpoiledError):
            kit.stop_run(f"pgmonkey: {error}")
        raise _shown(error) from None
    for refusal in refusals:
        print(f"pgmonkey: {refusal}")  # noqa: T201 - captured into the test's report
    if failures:
        pytest.fail("\n".join(f"pgmonkey: {failure}" for failure in failures), pytrace=False)


# The marker


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _running
    _running = item
    # Decided at collection: this is paid for by every test.
    config = item.config
    wish = item.stash.get(_WISH, None)
    if wish is None:
        config.stash[_INTERCEPTION].isolation = config.stash[_OPTIONS].isolation
        return
    if wish.problem:
        pytest.fail(wish.problem, pytrace=False)
    config.stash[_INTERCEPTION].isolation = wish.isolation


def current_request() -> Any:
    """Give the fixture request of the test that is being set up."""
    return _running._request  # type: ignore[union-attr]


class _Wish(NamedTuple):
    """What a test asks of the kit."""

    isolation: str
    problem: str


def _wish(item: pytest.Item) -> _Wish:
    for marker in item.iter_markers(_MARKER):
        if problem := _marker_problem(marker):
            return _Wish("rollback", f"@pytest.mark.pgmonkey: {problem}")
    isolation = str(_marked(item, "isolation", item.config.stash[_OPTIONS].isolation))
    return _Wish(isolation, _shared_data_problem(item) if isolation == "clone" else "")


def _shared_data_problem(item: pytest.Item) -> str:
    for name in getattr(item, "fixturenames", ()):
        if name in _SHARED:
            return (
                f"{name} shares uncommitted data, which a clone does not have: use it with "
                "isolation='rollback', or make the data in the test"
            )
    return ""


def _marker_problem(marker: pytest.Mark) -> str:
    unknown = set(marker.kwargs) - {"isolation", "types"}
    if marker.args or unknown:
        what = ", ".join(sorted(unknown)) or "a positional argument"
        return f"takes isolation= and types=, not {what}"
    isolation = marker.kwargs.get("isolation", "rollback")
    if isolation not in ISOLATIONS:
        return f"isolation {isolation!r} is not one of rollback, clone"
    return ""


# The report


def pytest_report_header(config: pytest.Config) -> str | None:
    # With pytest-xdist the items are the workers' alone, and a header comes once.
    distributed = getattr(config.option, "dist", "no") != "no"
    if config.stash[_OPTIONS].given or (distributed and _mentions_kit(config)):
        return _header(config.stash[_OPTIONS])
    return None


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    if not config.stash[_OPTIONS].given and any(uses_kit(item) for item in items):
        return _header(config.stash[_OPTIONS])
    return None


def _header(options: Options) -> str:
    from ..servers.launch import choose

    try:
        choice = choose(options)
    except PGMonkeyError as error:
        return f"pgmonkey: {error}"
    return f"pgmonkey: {choice.description}, isolation={options.isolation} ({choice.why})"


class _FailedTests:
    """Keeps the databases of failed tests; most runs do without these hooks."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # what others make of a report is to be seen
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        kit = item.config.stash.get(_KIT, None)
        if kit is not None and item.config.stash[_INTERCEPTION].isolation == "clone":
            told = kit.see(item.nodeid, str(report.when), failed=report.failed)
            if told:
                # pytest shows what belongs to the teardown by this word with the failure, too.
                title = "pgmonkey teardown" if report.when == "teardown" else "pgmonkey"
                report.sections.append((title, told))
        return report


def pytest_unconfigure(config: pytest.Config) -> None:
    kit = config.stash.get(_KIT, None)
    if kit is not None:
        kit.close()
    run = config.stash.get(_RUN, None)
    if run is not None:
        _end_run(str(run["name"]))


# pytest-xdist


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of which run it is; called in the controller."""
    from ..servers.worker import RUN, new_run

    node.workerinput[RUN] = node.config.stash.setdefault(_RUN, new_run())


def _end_run(name: str) -> None:
    from ..servers.embedded.directories import homes

    if homes(name):
        from ..servers.embedded.workers import end_run

        end_run(name)
