"""Where the kit's sections of reports go: into JUnit XML, and to a terminal with colours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., pytest.RunResult]

DISTRIBUTED = pytest.mark.parametrize("distributed", [(), ("-n1",)], ids=["here", "xdist"])
STATEMENTS = "pgmonkey statements"
REPEATS = "pgmonkey repeats"


def needs(*arguments: str) -> None:
    if arguments:
        pytest.importorskip("xdist", reason="needs pytest-xdist: pip install '.[dev]'")


# JUnit XML

SUITE = """
    import pytest

    def test_call(pgmonkey):
        pgmonkey.execute("SELECT 'a\\x07\\x1b<b>'")
        assert 0

    @pytest.fixture
    def early(pgmonkey):
        pgmonkey.execute("SELECT 'set-up'")
        assert 0

    def test_setup(early):
        pass

    @pytest.fixture
    def late(pgmonkey):
        yield
        pgmonkey.execute("SELECT 'teardown'")
        assert 0

    def test_teardown(pgmonkey, late):
        pgmonkey.execute("SELECT 'call'")

    def test_both(pgmonkey, late):
        pgmonkey.execute("SELECT 'call'")
        assert 0

    def test_loop(pgmonkey):
        for n in range(12):
            pgmonkey.execute("SELECT 1")

    attempts = []

    @pytest.mark.flaky(reruns=1)
    def test_flaky(pgmonkey):
        pgmonkey.execute("SELECT 'flaky'")
        attempts.append(1)
        assert len(attempts) == 2

    def test_without():
        assert 0
"""


def cases_in(path: object) -> list[tuple[str, list[str], dict[str, str]]]:
    """Each test case's name, its elements, and its sections by title, which must differ."""
    found = []
    for case in ElementTree.parse(str(path)).iter("testcase"):
        sections: dict[str, str] = {}
        for element in case.iter("system-out"):
            heading, _, text = (element.text or "").partition("\n")
            title = heading.strip("- ")
            assert title not in sections
            assert heading == f" {title} ".center(80, "-")
            sections[title] = text
        found.append((case.attrib["name"], [element.tag for element in case], sections))
    return found


@DISTRIBUTED
def test_sections_are_in_the_xml(
    pytester: pytest.Pytester, run: Run, distributed: tuple[str, ...]
) -> None:
    """Once, in the test case that failed, in whichever phase; not those of other attempts."""
    pytest.importorskip("pytest_rerunfailures", reason="needs pip install '.[dev]'")
    needs(*distributed)
    pytester.makepyfile(test_it=SUITE)
    run("--junitxml=it.xml", "--pgmonkey-n-plus-one=warn", *distributed)
    found = cases_in(pytester.path / "it.xml")
    flaky = [case for case in found if case[0] == "test_flaky"]  # two in some releases
    found = [case for case in found if case not in flaky]
    assert flaky
    assert all(not sections for _, _, sections in flaky)
    assert [(name, elements, list(sections)) for name, elements, sections in found] == [
        ("test_call", ["failure", "system-out"], [STATEMENTS]),
        ("test_setup", ["error", "system-out"], [STATEMENTS]),
        ("test_teardown", ["error", "system-out"], [STATEMENTS]),
        ("test_both", ["failure", "system-out"], [STATEMENTS]),
        ("test_both", ["error", "system-out"], [STATEMENTS]),
        ("test_loop", ["system-out"], [REPEATS]),
        ("test_without", ["failure"], []),
    ]
    told = [sections.get(STATEMENTS, "") for _, _, sections in found]
    assert "SELECT 'a\\x07\\x1b<b>'" in told[0]
    assert "SELECT 'set-up'" in told[1]
    assert re.search(r"'call'.*'teardown'", told[2], re.DOTALL)
    assert "'call'" in told[3]
    assert "'teardown'" not in told[3]
    assert re.search(r"'call'.*'teardown'", told[4], re.DOTALL)
    assert found[5][2][REPEATS].startswith("test_it.py:30 runs one statement 12 times: SELECT 1")


def test_sections_of_passed_tests(pytester: pytest.Pytester, run: Run) -> None:
    """A later report's takes the place of an earlier one's; pytest's setting leaves them out."""
    pytest.importorskip("pytest_rerunfailures", reason="needs pip install '.[dev]'")
    pytester.makepyfile(test_it=SUITE)
    always = ("--junitxml=it.xml", "--pgmonkey-timeline=always", "-o", "junit_logging=all")
    selected = ("-k", "teardown or loop")
    run(*always, *selected)
    (_, _, late), (_, _, loop) = cases_in(pytester.path / "it.xml")
    assert "'teardown'" in late[STATEMENTS]
    assert loop[STATEMENTS].count("SELECT 1") == 12
    run(*always, *selected, "-o", "junit_log_passing_tests=false")
    (_, _, late), (_, elements, _) = cases_in(pytester.path / "it.xml")
    assert "'teardown'" in late[STATEMENTS]
    assert elements == []


@DISTRIBUTED
def test_a_run_without_a_terminal(
    pytester: pytest.Pytester, run: Run, distributed: tuple[str, ...]
) -> None:
    """-p no:terminal: the file has them nevertheless."""
    needs(*distributed)
    pytester.makepyfile(test_it=SUITE)
    run("-p", "no:terminal", "--junitxml=it.xml", "-k", "call", *distributed)
    ((_, _, sections),) = cases_in(pytester.path / "it.xml")
    assert "SELECT 'a\\x07" in sections[STATEMENTS]


# Colours

COLOURS = """
    import psycopg
    import pytest

    def test_it(pgmonkey):
        with pgmonkey.normal as conn:
            for n in range(51):
                conn.execute("SELECT %s::int", [n])
            conn.execute("SELECT 'a rather long text' AS a_name_for_it, %s::text", ["cut"])
            with pytest.raises(psycopg.Error):
                conn.execute("SELECT 1/0")
            conn.rollback()
        assert 0
"""
OTHERS = """
    import pytest

    def text_of(report):
        return dict(report.sections).get("pgmonkey statements", "")

    def pytest_runtest_logreport(report):
        assert "\\x1b" not in text_of(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(terminalreporter):
        (report,) = terminalreporter.stats["failed"]
        terminalreporter.write_line(f"PLAIN\\n{text_of(report)}\\nEND")
"""
SGR = re.compile(r"\x1b\[([\d;]*)m")


def told(lines: list[str]) -> tuple[list[str], list[str]]:
    """The section as pytest prints it, and as another plugin finds it afterwards."""
    title = next(n for n, line in enumerate(lines) if f"- {STATEMENTS} -" in line)
    begin, end = lines.index("PLAIN"), lines.index("END")
    plain = lines[begin + 1 : end]
    return lines[title + 1 : title + 1 + len(plain)], plain


def marked(line: str) -> list[tuple[str, str]]:
    """The parts of a line that have a colour, without those that time."""
    found = re.findall(r"\x1b\[(\d+)m([^\x1b]*)\x1b\[0m", line)
    return [(code, text) for code, text in found if not re.fullmatch(r" *\d+\.\d [\d. ]+", text)]


@DISTRIBUTED
def test_colours(
    pytester: pytest.Pytester,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    distributed: tuple[str, ...],
) -> None:
    """The terminal alone has them, and without them it is the plain text, of the same width."""
    needs(*distributed)
    monkeypatch.setenv("COLUMNS", "90")
    pytester.makeconftest(OTHERS)
    pytester.makepyfile(test_it=COLOURS)
    shown, plain = told(run("--color=yes", "-p", "no:junitxml", *distributed).stdout.lines)
    assert [SGR.sub("", line) for line in shown] == plain
    assert not SGR.search("\n".join(plain))
    assert max(map(len, plain)) <= 90
    titles, loop, cut, wrong, error, end = shown
    assert SGR.findall(titles) == ["2", "0"]
    assert marked(loop) == [("36", "┌"), ("33", "× 51 "), ("2", "  [0]")]
    assert marked(cut) == [("36", "│")]
    assert "…" in cut
    assert marked(wrong) == [("36", "│")]
    assert marked(error) == [("31", "! 22012: division by zero")]
    assert marked(end) == [("36", "└"), ("36", "ROLLBACK")]
    assert all(line.startswith("\x1b[2m ") for line in (loop, cut, wrong, end))


def test_no_colours(pytester: pytest.Pytester, run: Run) -> None:
    """pytest is told to have none."""
    pytester.makeconftest(OTHERS)
    pytester.makepyfile(test_it=COLOURS)
    result = run("--color=no")
    shown, plain = told(result.stdout.lines)
    assert shown == plain
    assert "\x1b" not in result.stdout.str()
