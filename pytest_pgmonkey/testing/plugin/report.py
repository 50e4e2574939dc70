"""The option `report`: one page of a run's tests and their statements, written at its end."""

from __future__ import annotations

import os
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import pytest

from ..record.page import Page, Shown
from ..record.trace import trace
from .collection import uses_kit
from .configure import OPTIONS
from .lifecycle import kit_in_use
from .statements import TITLE

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

_NAME: Final = "pgmonkey-report"
# Of reports, so that it comes to the process that writes the page.
_TRACE: Final = "pgmonkey_trace"
_OF_THE_KIT: Final = "pgmonkey"


def write_report(config: pytest.Config, file: Path) -> None:
    """Register the hooks that write the page; raises UsageError if it cannot be written."""
    options = config.stash[OPTIONS]
    config.pluginmanager.register(Traces(params=options.timeline_params), f"{_NAME}-traces")
    if hasattr(config, "workerinput"):
        return
    if problem := _obstacle(file):
        raise pytest.UsageError(f"{options.given['report']}: {problem}")
    if not config.option.collectonly:
        config.pluginmanager.register(Report(file, config.rootpath.name), _NAME)


def _obstacle(file: Path) -> str:
    """Tell why a file cannot be written, if that is known beforehand; else nothing."""
    if file.is_dir():
        return f"{file} is a directory; name a file in it"
    if not file.parent.is_dir():
        return f"the directory {file.parent} does not exist; create it, or name another file"
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        return f"{file} must not be written by this user; name another file"
    return ""


class Traces:
    """Adds a test's statements to the report of its end, in each process that runs tests."""

    def __init__(self, *, params: bool) -> None:
        self._params: Final = params

    # Inside of the wrapper in `statements`, which is first: it forgets the statements.
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "teardown":
            kit = kit_in_use(item.config)
            if kit is not None and (kit.record.number or uses_kit(item)):
                setattr(report, _TRACE, trace(kit.record, params=self._params))
        return report


class Report:
    """Collects the tests of all processes, and writes the page."""

    def __init__(self, file: Path, project: str) -> None:
        self._file: Final = file
        self._project: Final = project
        self._page: Final = Page()
        self._running: dict[str, Shown] = {}
        self._told = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":  # it may be run again
            self._running.pop(report.nodeid, None)
        shown = self._running.setdefault(report.nodeid, Shown(report.nodeid))
        if report.when != "teardown" or report.failed:
            shown.see(_outcome(report), report.longreprtext if report.failed else "")
        shown.note(_notes(report))
        # The terminal's reporter keeps each report to the end of the run.
        if (found := vars(report).pop(_TRACE, None)) is not None:
            shown.add(found)
            self._page.add(shown)
        elif report.when not in ("setup", "call", "teardown"):  # its worker has crashed
            self._page.add(shown)
        if report.when not in ("setup", "call"):
            self._running.pop(report.nodeid, None)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        try:
            self._file.write_text(self._page.html(self._project, written), "utf-8", newline="\n")
        except OSError as error:
            self._told = f"the report {self._file} could not be written: {error.strerror}"
        else:
            self._told = f"the report is {self._file}"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"pgmonkey: {self._told}")


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    return report.outcome


def _notes(report: pytest.TestReport) -> Iterator[str]:
    """Give what the kit says of a test in its reports, except the statements."""
    for title, text in report.sections:
        if title.startswith(_OF_THE_KIT) and title != TITLE:
            yield text
