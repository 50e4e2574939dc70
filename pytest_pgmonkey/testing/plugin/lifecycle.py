"""The kit of this process: made at its first use, it begins and ends tests until the run ends."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from ... import sources
from ...errors import PGMonkeyError, require_libpq
from .collection import CLONES_WANTED
from .configure import INTERCEPTION, OPTIONS
from .marker import isolation_of_running_test

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..kit import Kit
    from ..prepared import Database
    from ..servers.worker import Worker

KIT: Final = pytest.StashKey["Kit"]()
_RUN: Final = pytest.StashKey[dict[str, str | int]]()


def kit_of(config: pytest.Config) -> Kit:
    """Give the kit of this process; made at its first use, and with it all that is heavy."""
    kit = config.stash.get(KIT, None)
    if kit is None:
        try:
            from ..kit import Kit
        except ImportError:
            require_libpq()
            raise
        interception = config.stash[INTERCEPTION]
        # A doctest or getfixturevalue() may ask although no collected test said that it would.
        sources.interceptor = interception
        kit = config.stash[KIT] = Kit(
            config.stash[OPTIONS],
            interception,
            partial(_stop, config),
            _worker(config),
            clones_wanted=config.stash.get(CLONES_WANTED, False),
        )
    return kit


def prepare(config: pytest.Config, steps: Any) -> Database:
    """Prepare the database of this process; the server starts while the kit is imported."""
    from ..databases.schema import listed

    steps = listed(steps)
    if KIT in config.stash:
        return kit_of(config).prepare(steps)
    from ..servers.launch import launch

    launched = launch(config.stash[OPTIONS], _worker(config), steps)
    try:
        return kit_of(config).prepare(steps, launched)
    except BaseException:
        if launched is not None:
            launched.stop()
        raise


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


# Every test pays for these two: no context manager stands around them.


def begin(kit: Kit) -> None:
    """Begin a test in the isolation that it asks for."""
    try:
        kit.begin(isolation_of_running_test())
    except Exception as error:
        raise _shown(error) from None


def settle(kit: Kit) -> None:
    """End a test: roll it back, and fail it for what went wrong unseen."""
    try:
        failures, refusals = kit.end()
    except Exception as error:
        raise _shown(error) from None
    for refusal in refusals:
        print(f"pgmonkey: {refusal}")  # noqa: T201 - captured into the test's report
    if failures:
        pytest.fail("\n".join(f"pgmonkey: {failure}" for failure in failures), pytrace=False)


def pytest_unconfigure(config: pytest.Config) -> None:
    kit = config.stash.get(KIT, None)
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


def _worker(config: pytest.Config) -> Worker | None:
    workerinput = getattr(config, "workerinput", None)
    if workerinput is None:
        return None
    from ..servers.worker import worker_of

    return worker_of(workerinput)


def _end_run(name: str) -> None:
    from ..servers.embedded.directories import homes

    if homes(name):
        from ..servers.embedded.workers import end_run

        end_run(name)
