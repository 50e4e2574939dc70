"""Completes a teardown that was broken off, so that each test ends, and with it its fixtures.

pytest catches what a finalizer raises only if it is an `Exception`. A CancelledError, of a task
that a fixture has cancelled and awaits, ends pytest's loop: the finalizers that come next are never
called, and the next test gets the old values of their fixtures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from . import internals

if TYPE_CHECKING:
    from collections.abc import Generator

_NAME: Final = "pgmonkey-teardown"
STOPS: Final = (KeyboardInterrupt, pytest.exit.Exception)
"""What ends the run."""


def complete_teardowns(config: pytest.Config) -> None:
    """Register the hook that does so."""
    if not config.pluginmanager.has_plugin(_NAME):
        config.pluginmanager.register(_Teardowns(), _NAME)


class _Teardowns:
    @pytest.hookimpl(wrapper=True, trylast=True)  # what is said of it belongs to the teardown
    def pytest_runtest_teardown(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        teardown = internals.Teardown(item, nextitem)
        try:
            return (yield)
        except STOPS:
            raise
        except BaseException:
            while teardown.is_unfinished:
                _go_on(teardown)
            raise


def _go_on(teardown: internals.Teardown) -> None:
    try:
        teardown.go_on()
    except STOPS:
        raise
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"
        print("In the same teardown:", told)  # noqa: T201 - captured into the test's report
