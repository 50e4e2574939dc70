"""The private names of pytest that the plugin uses. No other module uses any."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from xml.etree.ElementTree import Element

# Attributes of pytest's functions, by the method that sets them.
_SET_BY: Final = {"__init__": "_fixtureinfo", "_initrequest": "_request"}
_IN_FIXTURES: Final = {"FixtureManager": "getfixturedefs", "FuncFixtureInfo": "name2fixturedefs"}
_IN_RUNNER: Final = "SetupState"  # the class in pytest's module runner
# Of pytest's module junitxml, whose names only runs that write such a file need.
_IN_JUNIT: Final = {"LogXML": "node_reporter", "_NodeReporter": "append to_xml"}


def unsupported(*, junit: bool = False) -> str:
    """Tell what the installed pytest has moved, and what to do; empty if nothing has moved.

    `junit` says that the run writes a file of `--junitxml`.
    """
    moved = [
        f"Function.{name}"
        for method, name in _SET_BY.items()
        if name not in _names_in(getattr(pytest.Function, method, None))
    ]
    if "_fixturemanager" not in pytest.Session.__annotations__:
        moved.append("Session._fixturemanager")
    if "_report_sections" not in _names_in(pytest.Item.__init__):
        moved.append("Item._report_sections")
    fixtures = sys.modules.get("_pytest.fixtures")
    for owner, name in _IN_FIXTURES.items():
        if not hasattr(getattr(fixtures, owner, None), name):
            moved.append(f"{owner}.{name}")
    moved += _moved_in_runner(sys.modules.get("_pytest.runner"))
    if junit:
        moved += _moved_in_junit(_junit_module())
    if not moved:
        return ""
    return (
        f"pytest {pytest.__version__} is not supported by this version of pytest-pgmonkey "
        f"(moved: {', '.join(moved)}); install an earlier pytest, update pytest-pgmonkey, or "
        "leave it out with -p no:pgmonkey"
    )


def _moved_in_runner(module: Any) -> Iterator[str]:
    if "_setupstate" not in _names_in(getattr(module, "pytest_sessionstart", None)):
        yield "Session._setupstate"
    state = getattr(module, _IN_RUNNER, None)
    if "stack" not in _names_in(getattr(state, "__init__", None)):
        yield f"{_IN_RUNNER}.stack"
    if not hasattr(state, "teardown_exact"):
        yield f"{_IN_RUNNER}.teardown_exact"


def _moved_in_junit(module: Any) -> list[str]:
    moved = [name for name in ("xml_key", "bin_xml_escape") if not hasattr(module, name)]
    for owner, names in _IN_JUNIT.items():
        found = getattr(module, owner, None)
        moved += [f"{owner}.{name}" for name in names.split() if not hasattr(found, name)]
    log = getattr(module, "LogXML", None)
    if "node_reporters_ordered" not in _names_in(getattr(log, "__init__", None)):
        moved.append("LogXML.node_reporters_ordered")
    return moved


def _junit_module() -> Any:
    return sys.modules.get("_pytest.junitxml")  # not there with -p no:junitxml


def _names_in(method: Any) -> Sequence[str]:
    return getattr(getattr(method, "__code__", None), "co_names", ())


def fixtures_of(item: pytest.Item) -> Mapping[str, Sequence[Any]]:
    """Give the definitions of the fixtures that an item names, innermost last."""
    info = getattr(item, "_fixtureinfo", None)
    return info.name2fixturedefs if info is not None else {}


def add_fixture(item: Any, name: str) -> None:
    """Count a fixture among those that an item has, though it does not name it."""
    known = item._fixtureinfo.name2fixturedefs
    if name not in known:
        known[name] = item.session._fixturemanager.getfixturedefs(name, item) or ()


def renew(item: Any) -> Callable[[], None]:
    """Reset an item that has run, so that it can be set up again; drop its report.

    Gives what brings the report back.
    """
    sections, failures = list(item._report_sections), getattr(item, "_excinfo", None)

    def restore() -> None:
        item._report_sections[:] = sections
        _set_failures(item, failures)

    item._initrequest()
    item._report_sections.clear()
    _set_failures(item, None)
    return restore


def _set_failures(item: Any, failures: Any) -> None:
    if failures is not None:
        item._excinfo = failures
    else:
        item.__dict__.pop("_excinfo", None)  # of a unittest.TestCase, which adds to what it finds


def failure_of(item: Any) -> BaseException | None:
    """Give how a test of unittest has failed, whose errors are not raised."""
    found = getattr(item, "_excinfo", None)
    return found[-1].value if found else None


def request_of(item: Any) -> pytest.FixtureRequest:
    """Give the fixture request of an item that is being set up."""
    return item._request  # type: ignore[no-any-return]


class Teardown:
    """The teardown of an item, and of what the next one does not share with it."""

    def __init__(self, item: Any, nextitem: pytest.Item | None) -> None:
        self._state: Final = item.session._setupstate
        self._nextitem: Final = nextitem
        self._nodes: Final = list(self._state.stack.items())

    @property
    def is_unfinished(self) -> bool:
        """Whether finalizers are left of a node that pytest takes for torn down."""
        return any(self._left())

    def go_on(self) -> None:
        """Call the next ones, up to one that breaks it off anew; raises what they raise."""
        self._state.stack.update(self._left())
        self._state.teardown_exact(self._nextitem)

    def _left(self) -> Iterator[tuple[Any, Any]]:
        for node, entry in self._nodes:
            if entry[0] and node not in self._state.stack:
                yield node, entry


class JUnitFile:
    """The file of `--junitxml`, which pytest writes at the end of the run."""

    def __init__(self, log: Any) -> None:
        self._log: Final = log
        self._added: dict[tuple[Any, str], Element] = {}

    @classmethod
    def of(cls, config: pytest.Config) -> JUnitFile | None:
        """Give the one that this process writes, if any."""
        module = _junit_module()
        log = config.stash.get(module.xml_key, None) if module is not None else None
        return cls(log) if log is not None else None

    @contextmanager
    def adding(
        self, report: pytest.TestReport, sections: Sequence[tuple[str, str]]
    ) -> Iterator[None]:
        """Add sections to a report's test case, which pytest takes into the file in the block.

        A section that an earlier report of the same test case had is replaced.
        """
        ordered = self._log.node_reporters_ordered
        testcase = self._log.node_reporter(report)
        known = len(ordered)
        yield
        # Where the call and the teardown have failed, the latter has a test case of its own.
        testcase = ordered[-1] if len(ordered) > known else testcase
        # The teardown's report has ended it: what it is then can be added to, and nothing else.
        add = testcase.to_xml().append if report.when == "teardown" else testcase.append
        for title, text in sections:
            if (testcase, title) not in self._added:
                element = self._added[testcase, title] = _new_element("system-out")
                add(element)
            shown = f"{f' {title} '.center(80, '-')}\n{text}\n"
            self._added[testcase, title].text = _junit_module().bin_xml_escape(shown)


def _new_element(tag: str) -> Element:
    from xml.etree.ElementTree import Element  # slow to load, and pytest has it by then

    return Element(tag)
