"""The kit of this process: made at its first use, it begins and ends tests until the run ends.

And what the report tells of its server, and of the databases that it keeps.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from ... import sources
from ...errors import PGMonkeyError, require_libpq
from .collection import (
    ISOLATIONS_WANTED,
    RESTART_WANTED,
    isolation_of_running_test,
    uses_kit,
)
from .configure import INTERCEPTION, OPTIONS, is_distributed, mentions_kit

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from ..gateway.entrance.entrance import Entrance
    from ..kit import Kit
    from ..options import Options
    from ..prepared import Database
    from ..servers.server import Worker

ENTRANCE: Final[pytest.StashKey[Entrance | None]] = pytest.StashKey()
_KIT: Final = pytest.StashKey["Kit"]()
_RUN_VARIABLE: Final = "_PGMONKEY_RUN"
_making: Final = threading.Lock()  # a client of the gateway may be the first to ask
_RUN: Final = pytest.StashKey[dict[str, str | int]]()


def kit_of(config: pytest.Config) -> Kit:
    """Give the kit of this process; its first use imports everything that is heavy."""
    kit = config.stash.get(_KIT, None)
    if kit is None:
        with _making:
            return config.stash.get(_KIT, None) or _make_kit(config)
    return kit


def kit_in_use(config: pytest.Config) -> Kit | None:
    """Give the kit of this process, if there is one yet."""
    return config.stash.get(_KIT, None)


def _make_kit(config: pytest.Config) -> Kit:
    try:
        from ..kit import Kit
    except ImportError:
        require_libpq()
        raise
    interception = config.stash[INTERCEPTION]
    # A doctest or getfixturevalue() may ask although no collected test said that it would.
    sources.interceptor = interception
    kit = config.stash[_KIT] = Kit(
        config.stash[OPTIONS],
        interception,
        partial(_stop, config),
        _worker(config),
        isolations_wanted=partial(config.stash.get, ISOLATIONS_WANTED, ()),
        restart_wanted=partial(config.stash.get, RESTART_WANTED, False),
        entrance=config.stash.get(ENTRANCE, None),
    )
    return kit


def prepare(config: pytest.Config, steps: Any) -> Database:
    """Prepare the database of this process; the server starts while the kit is imported."""
    from ..databases.schema import listed

    steps = listed(steps)
    if _KIT in config.stash:
        return kit_of(config).prepare(steps)
    from ..servers.launch import launch

    launched = launch(config.stash[OPTIONS], _worker(config), steps)
    try:
        return kit_of(config).prepare(steps, launched)
    except BaseException:
        if launched is not None and launched.exception() is None:
            launched.result().stop()
        raise


def _stop(config: pytest.Config, reason: str) -> None:
    session = config.pluginmanager.get_plugin("session")
    if session is not None:
        session.shouldstop = reason


@contextmanager
def show_errors() -> Iterator[None]:
    """Fail with only the message of our own errors, because our stack would hide it."""
    try:
        yield
    except Exception as error:
        raise _shown(error) from None


def _shown(error: Exception) -> BaseException:
    if isinstance(error, PGMonkeyError) or type(error).__module__.startswith("psycopg"):
        return pytest.fail.Exception(f"pgmonkey: {error}", pytrace=False)
    return error


# Every test pays for these two: no context manager stands around them.


def begin(kit: Kit) -> None:
    """Begin a test in the isolation that it asks for."""
    try:
        kit.begin(*isolation_of_running_test())
    except Exception as error:
        raise _shown(error) from None


def settle(kit: Kit) -> None:
    """End a test: roll it back, and fail it if something went wrong unseen."""
    try:
        failures, refusals = kit.end()
    except Exception as error:
        raise _shown(error) from None
    for refusal in refusals:
        print(f"pgmonkey: {refusal}")  # noqa: T201 - captured into the test's report
    if failures:
        pytest.fail("\n".join(f"pgmonkey: {failure}" for failure in failures), pytrace=False)


def pytest_unconfigure(config: pytest.Config) -> None:
    kit = config.stash.get(_KIT, None)
    if kit is not None:
        kit.close()
    run = config.stash.get(_RUN, None)
    if run is not None:
        _end_run(str(run["name"]), config.stash[OPTIONS].data_directory)


# pytest-xdist


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker which run it belongs to; called in the controller."""
    from ..servers.server import RUN, new_run
    from .memory import WORKER_INPUT, of_this_run

    node.workerinput[RUN] = node.config.stash.setdefault(_RUN, new_run())
    node.workerinput[WORKER_INPUT] = of_this_run(node.config).known


def _worker(config: pytest.Config) -> Worker | None:
    workerinput = getattr(config, "workerinput", None)
    if workerinput is None and not (worker_name() and _RUN_VARIABLE in os.environ):
        return None
    from ..servers.server import RUN, worker_of

    if workerinput is None:  # pytest-xdist tells it after the first conftests were loaded
        run = json.loads(os.environ[_RUN_VARIABLE])
        workerinput = {"workerid": worker_name(), RUN: run}
    return worker_of(workerinput)


def worker_name() -> str:
    """Give this process's name as a worker, before pytest-xdist tells it."""
    # A pytest that a test starts has the variable, too.
    is_started_by_execnet = not hasattr(sys.modules.get("__main__"), "__file__")
    return os.environ.get("PYTEST_XDIST_WORKER", "") if is_started_by_execnet else ""


def name_run(config: pytest.Config) -> dict[str, str]:
    """Give the variables that tell workers which run they belong to, before pytest-xdist does."""
    from ..servers.server import new_run

    run = config.stash[_RUN] = new_run()
    return {_RUN_VARIABLE: json.dumps(run)}


def _end_run(name: str, data: Path | None) -> None:
    from ..servers.embedded.directories import homes

    if found := homes(name, data=data):
        from ..servers.embedded.server import end_run

        end_run(found)


# What the report tells: the server of the run, and the databases of failed tests


def pytest_report_header(config: pytest.Config) -> str | None:
    # With pytest-xdist the items are the workers' alone, and a header comes once.
    if config.stash[OPTIONS].given or (is_distributed(config) and mentions_kit(config)):
        return _header(config.stash[OPTIONS])
    return None


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    if not config.stash[OPTIONS].given and any(uses_kit(item) for item in items):
        return _header(config.stash[OPTIONS])
    return None


def _header(options: Options) -> str:
    from ..servers.launch import choose

    try:
        choice = choose(options)
    except PGMonkeyError as error:
        return f"pgmonkey: {error}"
    isolation = options.isolation
    if isolation == "auto" and options.expects_existing:
        isolation = "rollback"  # of which no clone is made unasked
    return f"pgmonkey: {choice.description}, isolation={isolation} ({choice.why})"


def pytest_enter_pdb(config: pytest.Config) -> None:
    kit = config.stash.get(_KIT, None)
    if kit is not None and (pointer := kit.pointer()):
        config.get_terminal_writer().line(f"pgmonkey: {pointer}")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.stash[OPTIONS].keep != "never":
        session.config.pluginmanager.register(_FailedTests(), "pgmonkey-keep")


class _FailedTests:
    """Reports the kept databases of failed tests; most runs do not register these hooks."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # what others make of a report is to be seen
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        kit = item.config.stash.get(_KIT, None)
        if kit is not None:
            told = kit.see(item.nodeid, str(report.when), failed=report.failed)
            if told:
                # pytest shows what belongs to the teardown by this word with the failure, too.
                title = "pgmonkey teardown" if report.when == "teardown" else "pgmonkey"
                report.sections.append((title, told))
        return report
