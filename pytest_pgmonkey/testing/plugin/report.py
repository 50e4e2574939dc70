"""What pytest's report tells: the server of the run, and the databases of failed tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ...errors import PGMonkeyError
from .collection import uses_kit
from .configure import OPTIONS, mentions_kit
from .lifecycle import KIT

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..options import Options


def pytest_report_header(config: pytest.Config) -> str | None:
    # With pytest-xdist the items are the workers' alone, and a header comes once.
    distributed = getattr(config.option, "dist", "no") != "no"
    if config.stash[OPTIONS].given or (distributed and mentions_kit(config)):
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
    return f"pgmonkey: {choice.description}, isolation={options.isolation} ({choice.why})"


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.stash[OPTIONS].keep != "never":
        session.config.pluginmanager.register(_FailedTests(), "pgmonkey-keep")


class _FailedTests:
    """Tells of the databases of failed tests that are kept; most runs do without these hooks."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # what others make of a report is to be seen
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        kit = item.config.stash.get(KIT, None)
        if kit is not None:
            told = kit.see(item.nodeid, str(report.when), failed=report.failed)
            if told:
                # pytest shows what belongs to the teardown by this word with the failure, too.
                title = "pgmonkey teardown" if report.when == "teardown" else "pgmonkey"
                report.sections.append((title, told))
        return report
