"""Writes the sections that the kit adds to reports, to the terminal and into JUnit XML."""

from __future__ import annotations

from itertools import chain
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Final

import pytest

from .internals import JUnitFile

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from ..record.lines import Line

_OWN: Final = "pgmonkey"  # what titles of the kit begin with
_WORKER_INPUT: Final = "pgmonkey_terminal"
# Of reports: sections as the terminal shows them, by title.
_COLOURED: Final = "pgmonkey_coloured"
_OUTCOMES: Final = ("passed", "failed", "skipped")


class Terminal:
    """The terminal in which the run's reports are shown."""

    def __init__(self, width: int, *, has_colours: bool) -> None:
        self.width: Final = width
        self._has_colours: Final = has_colours

    @classmethod
    def of(cls, config: pytest.Config) -> Terminal:
        """Give the one of this run; for a worker of pytest-xdist it is the controller's."""
        told = getattr(config, "workerinput", {}).get(_WORKER_INPUT)
        if told is not None:
            return cls(told["width"], has_colours=told["has_colours"])
        if not config.pluginmanager.has_plugin("terminalreporter"):  # -p no:terminal
            return cls(get_terminal_size().columns, has_colours=False)
        writer = config.get_terminal_writer()
        return cls(writer.fullwidth, has_colours=writer.hasmarkup)

    def tell(self, node: Any) -> None:
        """Tell a worker of it."""
        node.workerinput[_WORKER_INPUT] = {
            "width": self.width,
            "has_colours": self._has_colours,
        }

    def add_section(self, report: pytest.TestReport, title: str, lines: Sequence[Line]) -> None:
        """Add a section to a report, as plain text; the terminal may show it in colours."""
        from ..record.lines import coloured, plain

        report.sections.append((title, plain(lines)))
        if self._has_colours:
            setattr(report, _COLOURED, {title: coloured(lines)})


class Sections:
    """The hooks of the process that writes the summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._junit: Final = JUnitFile.of(config)
        self._tells_of_passed: Final = bool(
            self._junit and config.getini("junit_log_passing_tests")
        )
        self._plain: list[tuple[Any, list[tuple[str, str]]]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(
        self, report: pytest.TestReport
    ) -> Generator[None, object, object]:
        if self._junit is None or not (told := self._of_junit(report)):
            return (yield)
        with self._junit.adding(report, told):
            return (yield)

    def _of_junit(self, report: pytest.TestReport) -> list[tuple[str, str]]:
        # Other outcomes are of plugins such as pytest-rerunfailures: the test is run once more.
        if report.outcome not in _OUTCOMES or (report.passed and not self._tells_of_passed):
            return []
        return [section for section in report.sections if section[0].startswith(_OWN)]

    @pytest.hookimpl(wrapper=True, tryfirst=True, specname="pytest_terminal_summary")
    def pytest_terminal_summary_in_colours(
        self, terminalreporter: Any
    ) -> Generator[None, object, object]:
        for report in chain.from_iterable(terminalreporter.stats.values()):
            if shown := getattr(report, _COLOURED, None):
                plain = report.sections
                self._plain.append((report, plain))
                report.sections = [(title, shown.get(title, text)) for title, text in plain]
        try:
            return (yield)  # pytest's own hook, which prints the failures, is a wrapper inside
        finally:
            self._uncolour()

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self) -> None:
        # pytest has printed them; other plugins may make something else of reports.
        self._uncolour()

    def _uncolour(self) -> None:
        while self._plain:
            report, sections = self._plain.pop()
            report.sections = sections
