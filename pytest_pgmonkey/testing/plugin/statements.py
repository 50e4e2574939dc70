"""Tests' statements in reports and the summary, and their budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from .collection import budget_of
from .configure import OPTIONS
from .lifecycle import kit_in_use
from .sections import Sections, Terminal

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..kit import Kit

_NAME: Final = "pgmonkey-statements"
TITLE: Final = "pgmonkey statements"
_REPEATS: Final = "pgmonkey repeats"
# pytest shows what belongs to the teardown by this word with the failure, too.
_LEAKS: Final = "pgmonkey leaks (teardown)"
_AGAIN: Final = "a statement again and again"
_NOT_RETURNED: Final = "left connections or changes behind"
# Of reports, so that they come to the process that writes the summary.
_SPENT: Final = "pgmonkey_spent"
_REPEATED: Final = "pgmonkey_repeats"
_LEAKED: Final = "pgmonkey_leaks"


def tell_of_statements(config: pytest.Config) -> None:
    """Register the hooks that report statements."""
    if not config.pluginmanager.has_plugin(_NAME):
        config.pluginmanager.register(Statements(config), _NAME)
        config.pluginmanager.register(Sections(config), f"{_NAME}-sections")


@pytest.hookimpl(optionalhook=True, specname="pytest_configure_node")
def pytest_configure_node_of_summary(node: Any) -> None:
    """Register what pytest-xdist's controller needs: the summary, and the terminal for workers."""
    tell_of_statements(node.config)
    Terminal.of(node.config).tell(node)


class Statements:
    """The hooks of a run whose tests use the kit."""

    def __init__(self, config: pytest.Config) -> None:
        self._options: Final = config.stash[OPTIONS]
        self._repeats: list[str] = []
        self._durations: Any = None
        self._repeated: dict[str, list[str]] = {}
        self._leaked: dict[str, list[str]] = {}
        if self._options.durations:
            from ..record.durations import Durations

            self._durations = Durations()

    # While a test runs

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        __tracebackhide__ = True
        self._repeats = []
        kit, budget, options = kit_in_use(item.config), budget_of(item), self._options
        if kit is None or (budget is None and options.n_plus_one == "off"):
            return (yield)
        start, before = kit.record.number, kit.record.counted
        result = yield
        if budget is not None:
            _keep_to(budget, kit, start, before)
        if options.n_plus_one != "off":
            from ..record.repeats import repeats

            self._repeats = repeats(kit.record.since(start), options.n_plus_one_threshold)
            if self._repeats and options.n_plus_one == "error":
                told, self._repeats = "\n".join(self._repeats), []
                pytest.fail(f"pgmonkey n_plus_one: {told}", pytrace=False)
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # what others make of a report is to be seen
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        kit = kit_in_use(item.config)
        if kit is None:
            return report
        if self._is_told_in(report):
            terminal = Terminal.of(item.config)
            if lines := kit.timeline(terminal.width):
                terminal.add_section(report, TITLE, lines)
        if report.when == "call" and self._repeats:
            report.sections.append((_REPEATS, "\n".join(self._repeats)))
            setattr(report, _REPEATED, self._repeats)
        if report.when == "teardown":
            if self._durations is not None:
                from ..record.durations import spent

                setattr(report, _SPENT, spent(kit.record.since(0)))
            if kit.leaks:
                report.sections.append((_LEAKS, "\n".join(kit.leaks)))
                setattr(report, _LEAKED, kit.leaks)
            kit.record.forget()  # the next test may be one without a database
        return report

    def _is_told_in(self, report: pytest.TestReport) -> bool:
        wanted = self._options.timeline
        if wanted == "always" and report.when == "call":
            return True
        return wanted != "never" and report.failed

    # In the process that writes the summary

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if found := getattr(report, _REPEATED, None):
            self._repeated[report.nodeid] = found
        if found := getattr(report, _LEAKED, None):
            self._leaked[report.nodeid] = found
        if self._durations is not None and (found := getattr(report, _SPENT, None)):
            self._durations.add(report.nodeid, found)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        _tell(terminalreporter, self._repeated, "1 test runs", "{} tests run", _AGAIN)
        _tell(terminalreporter, self._leaked, "1 test has", "{} tests have", _NOT_RETURNED)
        if self._durations is not None:
            terminalreporter.ensure_newline()
            terminalreporter.section("pgmonkey durations")
            width = terminalreporter.config.get_terminal_writer().fullwidth
            for line in self._durations.lines(self._options.durations, width):
                terminalreporter.write_line(line)


def _tell(reporter: Any, found: dict[str, list[str]], one: str, several: str, what: str) -> None:
    """Write a line on what was found, and the tests below it."""
    if found:
        tests = one if len(found) == 1 else several.format(len(found))
        reporter.write_line(f"pgmonkey: {tests} {what}")
    for test, lines in found.items():
        for each in lines:
            reporter.write_line(f"  {test}: {each}")


def _keep_to(budget: int, kit: Kit, start: int, before: int) -> None:
    """Fail a test that has run more queries than its marker allows."""
    __tracebackhide__ = True
    from ..record.budgets import excess

    count = kit.record.counted - before
    if told := excess(kit.record, start, count, budget, exactly=False):
        pytest.fail(f"@pytest.mark.pgmonkey(max_queries={budget}): {told}", pytrace=False)
