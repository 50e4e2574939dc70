"""What reports tell of a test's statements, and the marker's budget of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from .collection import budget_of
from .configure import OPTIONS
from .lifecycle import kit_in_use

if TYPE_CHECKING:
    from collections.abc import Generator

_NAME: Final = "pgmonkey-statements"
_TITLE: Final = "pgmonkey statements"


def tell_of_statements(config: pytest.Config) -> None:
    """Have reports of this run tell of statements."""
    if not config.pluginmanager.has_plugin(_NAME):
        config.pluginmanager.register(Statements(config), _NAME)


class Statements:
    """The hooks of a run whose tests use the kit."""

    def __init__(self, config: pytest.Config) -> None:
        self._options: Final = config.stash[OPTIONS]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        __tracebackhide__ = True
        budget, kit = budget_of(item), kit_in_use(item.config)
        if budget is None or kit is None:
            return (yield)
        start, before = kit.record.number, kit.record.counted
        result = yield
        from ..record.budgets import excess

        count = kit.record.counted - before
        if told := excess(kit.record, start, count, budget, exactly=False):
            pytest.fail(f"@pytest.mark.pgmonkey(max_queries={budget}): {told}", pytrace=False)
        return result

    def _is_told_in(self, report: pytest.TestReport) -> bool:
        wanted = self._options.timeline
        if wanted == "always" and report.when == "call":
            return True
        return wanted != "never" and report.failed

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # what others make of a report is to be seen
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if not self._is_told_in(report):
            return report
        kit = kit_in_use(item.config)
        width = item.config.get_terminal_writer().fullwidth
        if kit is not None and (told := kit.timeline(width)):
            report.sections.append((_TITLE, told))
        return report
