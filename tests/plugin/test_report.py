"""The page of a run: what is in it, that nothing in it is markup, and how a person uses it."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from helpers.browser import Browser, find_chromium
from helpers.missing import miss
from hypothesis import given
from hypothesis import strategies as st

from pytest_pgmonkey.testing.record.page import Page, Shown, embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Run = Callable[..., pytest.RunResult]

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<!-- <script>",
    "]]>",
    "\u2028\u2029",
    "\ud800",
    "&lt;img src=x onerror='window.hacked = 1'>",
    '"\\',
    "$data $style ${script}",
)
TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), max_size=20))
#: Columns of a run, as the page's script names them.
LANE, MARK, TIMES, KIND, SQL, PARAMS, ORIGIN, ROWS, ERROR = range(3, 12)


def data_in(html: str) -> dict[str, Any]:
    (found,) = DATA.findall(html)
    data: dict[str, Any] = json.loads(found)
    return data


def shown(test: str, *texts: str, outcome: str = "passed", ms: float = 1.0) -> Shown:
    """A test with a run of one statement for each text, which stands wherever a text may."""
    made = Shown(test)
    made.see(outcome, "".join(texts) if outcome == "failed" else "")
    made.note(texts)
    made.add(
        {
            "lanes": ["#1"],
            "missing": 0,
            "runs": [
                [n, ms, n + ms, 0, " ", 1, "read", text, text, text, 1, text]
                for n, text in enumerate(texts)
            ],
        }
    )
    return made


# The page


@given(st.recursive(st.none() | st.integers() | TEXT, lambda each: st.lists(each) | st.tuples()))
def test_data_is_no_markup(data: Any) -> None:
    """It comes back as it was, and has no character that could end its element."""
    written = embedded(data)
    assert json.loads(written) == json.loads(json.dumps(data))
    assert not set("<>&\u2028\u2029") & set(written)


@given(TEXT, st.lists(TEXT, max_size=3), st.sampled_from(["passed", "failed"]))
def test_nothing_of_a_test_is_outside_of_the_data(name: str, texts: list[str], how: str) -> None:
    """But for the data, each page is the same."""
    page = Page()
    page.add(shown(name, *texts, outcome=how))
    html = page.html(name, "now")
    assert DATA.sub("", html) == DATA.sub("", Page().html("", "now"))
    html.encode("utf-8")
    data = data_in(html)
    (test,) = data["tests"]
    plain = [text.encode("utf-8", "backslashreplace").decode("utf-8") for text in texts]
    assert [data["texts"][run[SQL]] for run in test["runs"]] == texts
    assert test["notes"] == list(dict.fromkeys(plain))


def test_failed_tests_are_first() -> None:
    """Then those with most time in the database; a later attempt replaces an earlier one."""
    page = Page()
    for test, outcome, ms in (
        ("again", "failed", 9.0),
        ("quick", "passed", 1.0),
        ("slow", "passed", 5.0),
        ("bad", "failed", 2.0),
        ("worse", "failed", 3.0),
        ("again", "passed", 4.0),
    ):
        page.add(shown(test, "SELECT 1", outcome=outcome, ms=ms))
    tests = data_in(page.html("", ""))["tests"]
    assert [test["id"] for test in tests] == ["worse", "bad", "slow", "again", "quick"]


def test_a_failure_is_cut_to_its_end() -> None:
    """There its reason stands."""
    test = Shown("test")
    test.see("failed", "\n".join(["first", *["x" * 2000] * 200, "E reason"]))
    lines = test.failures[0].splitlines()
    assert lines[0] == "(122 lines before)"
    assert lines[-1] == "E reason"
    assert max(map(len, lines)) == 500


@pytest.mark.parametrize("number", [6, 40])
def test_a_page_is_bounded(number: int) -> None:
    """The statements of quick tests that passed are left out first; sums stay."""
    page = Page(most_runs=10)
    for n in range(number):
        page.add(shown(f"test {n}", "SELECT 1", "SELECT 2", "SELECT 3", ms=n))
    page.add(shown("test bad", "SELECT 1", "SELECT 2", outcome="failed", ms=0))
    data = data_in(page.html("", ""))
    assert [test["id"] for test in data["tests"] if not test["isCut"]] == [
        "test bad",
        f"test {number - 1}",
        f"test {number - 2}",
    ]
    assert sum(test["count"] for test in data["tests"]) == 3 * number + 2
    assert sum(len(test["runs"]) for test in data["tests"]) == 8
    counts = {data["texts"][text]: count for text, count, _, _ in data["statements"]}
    assert counts == {"SELECT 1": number + 1, "SELECT 2": number + 1, "SELECT 3": number}


# Runs

SUITE = """
    import psycopg
    import pytest

    @pytest.fixture
    def item(pgmonkey):
        pgmonkey.execute("CREATE TABLE item (id int PRIMARY KEY, name text)")

    def test_fails(pgmonkey, item):
        with pgmonkey.pool as conn:
            for n in range(30):
                conn.execute("INSERT INTO item VALUES (%s, %s)", [n, "</script><b>x"])
        with psycopg.connect(pgmonkey.dsn, application_name="billing") as client:
            client.execute("SELECT *\\n  FROM item WHERE id < 3")
            client.rollback()
        with pgmonkey.pool as conn:
            conn.execute("INSERT INTO item VALUES (1)")

    def test_passes(pgmonkey):
        pgmonkey.execute("SELECT pg_sleep(0.3)")

    def test_is_moved(pgmonkey):
        pgmonkey.execute("VACUUM")

    def test_secret(pgmonkey):
        pgmonkey.execute("SELECT %s::text AS password, 'hunter1' AS x", ["hunter2"])
        with pytest.raises(psycopg.Error):
            pgmonkey.execute("SELECT 'hunter3'::int AS token")

    def test_without():
        pass

    @pytest.mark.skip
    def test_skipped(pgmonkey):
        pass

    @pytest.mark.xfail
    def test_expected(pgmonkey):
        pgmonkey.execute("SELECT 1/0")

    @pytest.fixture
    def late(pgmonkey):
        yield
        pgmonkey.execute("SELECT 'at the end'")
        assert 0, "too late"

    def test_ends_badly(late):
        pass
"""
FAILED = ["test_ends_badly", "test_fails"]


def read_page(path: Path) -> dict[str, dict[str, Any]]:
    """Give the tests of a page by their names; texts stand in the place of their numbers."""
    data = data_in(path.read_text("utf-8"))
    for test in data["tests"]:
        for run in test["runs"]:
            run[SQL] = data["texts"][run[SQL]]
    return {test["id"].rpartition("::")[2]: test for test in data["tests"]}


@pytest.mark.parametrize("distributed", [(), ("-n2",)])
def test_a_run_has_a_page(
    pytester: pytest.Pytester, run: Run, distributed: tuple[str, ...]
) -> None:
    """All of its tests with a database, of all workers; how they ended, and what they did."""
    if distributed:
        pytest.importorskip("xdist", reason="needs pytest-xdist: pip install '.[dev]'")
    pytester.makepyfile(test_it=SUITE)
    result = run("--pgmonkey-report=page.html", *distributed)
    result.assert_outcomes(passed=5, failed=1, errors=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines([f"pgmonkey: the report is {pytester.path / 'page.html'}"])
    tests = read_page(pytester.path / "page.html")
    assert sorted(list(tests)[:2]) == FAILED
    assert {name: test["outcome"] for name, test in tests.items()} == {
        **dict.fromkeys(FAILED, "failed"),
        **dict.fromkeys(("test_passes", "test_is_moved", "test_secret"), "passed"),
        "test_skipped": "skipped",
        "test_expected": "xfailed",
    }
    fails = tests["test_fails"]
    assert "\ntest_it.py:16: " in fails["failure"]
    assert fails["failure"].endswith(": UniqueViolation")
    assert [re.sub(r"\d{2,}", "PID", lane) for lane in fails["lanes"]] == [
        "#1",
        "#2",
        "#3 billing (PID)",
        "#4",
    ]
    assert [
        [each[LANE], each[MARK], each[TIMES], each[KIND], each[SQL], each[PARAMS], each[ROWS]]
        for each in fails["runs"]
    ] == [
        [0, " ", 1, "schema", "CREATE TABLE item (id int PRIMARY KEY, name text)", "", None],
        [1, "┌", 30, "write", "INSERT INTO item VALUES (%s, %s)", "[0, '</script><b>x']", 1],
        [1, "└", 1, "control", "COMMIT", "", None],
        [2, "┌", 1, "control", "BEGIN", "", None],
        [2, "│", 1, "read", "SELECT *\n  FROM item WHERE id < 3", "", 3],
        [2, "└", 1, "control", "ROLLBACK", "", None],
        [3, "┌", 1, "write", "INSERT INTO item VALUES (1)", "", None],
        [3, "└", 1, "control", "ROLLBACK", "", None],
    ]
    assert fails["runs"][1][ORIGIN] == "test_it.py:11"
    assert fails["runs"][6][ERROR].startswith("23505: duplicate key")
    assert (fails["count"], fails["errors"]) == (37, 1)
    assert tests["test_ends_badly"]["failure"].count("too late") == 2
    assert [each[SQL] for each in tests["test_ends_badly"]["runs"]] == ["SELECT 'at the end'"]
    assert "ran in a clone" in tests["test_is_moved"]["notes"][0]
    assert [each[SQL] for each in tests["test_is_moved"]["runs"]] == ["VACUUM"]
    assert [each[SQL : PARAMS + 1] for each in tests["test_secret"]["runs"]] == [
        ["SELECT %s::text AS password, … AS x", "…"],
        ["SELECT …::int AS token", ""],
    ]
    assert tests["test_secret"]["runs"][1][ERROR] == "22P02"
    assert "hunter" not in (pytester.path / "page.html").read_text("utf-8")


def test_attempts_and_parameters(pytester: pytest.Pytester, run: Run) -> None:
    """The last attempt counts; parameters are left out where the timeline leaves them out."""
    pytest.importorskip("pytest_rerunfailures", reason="needs pytest-rerunfailures")
    pytester.makepyfile(
        """
        attempts = []

        def test_flaky(pgmonkey):
            attempts.append(1)
            pgmonkey.execute("SELECT %s::int", [len(attempts)])
            assert len(attempts) == 3

        def test_parts(pgmonkey, request):
            pgmonkey.execute("SELECT 1")
        """
    )
    options = ("--reruns=3", "--pgmonkey-report=page.html", "--pgmonkey-timeline-params=false")
    run(*options).stdout.fnmatch_lines(["*2 passed, 2 rerun*"])
    tests = read_page(pytester.path / "page.html")
    assert {name: test["outcome"] for name, test in tests.items()} == {
        "test_flaky": "passed",
        "test_parts": "passed",
    }
    flaky = tests["test_flaky"]
    assert (flaky["count"], flaky["failure"]) == (1, "")
    assert flaky["runs"][0][PARAMS] == ""


def test_a_crashed_worker(pytester: pytest.Pytester, run: Run) -> None:
    """Its test has failed, with nothing known of its statements."""
    pytest.importorskip("xdist", reason="needs pytest-xdist: pip install '.[dev]'")
    pytester.makepyfile(
        """
        import os

        def test_crashes(pgmonkey):
            os._exit(3)
        """
    )
    run("-n1", "--pgmonkey-report=page.html")
    (test,) = read_page(pytester.path / "page.html").values()
    assert (test["outcome"], test["count"], test["runs"]) == ("failed", 0, [])
    assert "crashed" in test["failure"]


def test_a_file_that_cannot_be_written(pytester: pytest.Pytester, run: Run) -> None:
    """A usage error where it is known at the start; else a line at the end."""
    pytester.makepyfile(
        """
        import os, sys

        def test_it():
            if os.path.isdir("there"):
                os.rmdir("there")
            else:
                assert "pytest_pgmonkey.testing.plugin.report" not in sys.modules
                assert "pytest_pgmonkey.testing.record.page" not in sys.modules
        """
    )
    result = run("--pgmonkey-report=nowhere/page.html")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    directory = pytester.path / "nowhere"
    told = f"--pgmonkey-report: the directory {directory} does not exist; create it, or name"
    result.stderr.fnmatch_lines([f"*{told}*"])
    (pytester.path / "there").mkdir()
    result = run("--pgmonkey-report=there")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*there is a directory; name a file in it"])
    result = run("--pgmonkey-report=there/page.html")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["pgmonkey: the report *page.html could not be written: No such*"])
    run().assert_outcomes(passed=1)


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None or os.name == "nt":
        miss("Chromium (Debian: chromium)")
    with Browser(program, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


VISIBLE = "[...document.querySelectorAll('.test')].filter((each) => each.offsetParent).map(name)"
NAME = "const name = (each) => each.querySelector('.name').textContent;"


def names(browser: Browser) -> list[str]:
    """The names of the tests that can be seen."""
    found: list[str] = browser.evaluate(f"(() => {{ {NAME} return {VISIBLE}; }})()")
    return [name.rpartition("::")[2] for name in found]


def text_of(browser: Browser, selector: str) -> str:
    """What a person reads in the first element that a selector finds."""
    found: str = browser.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
    return found


def focused(browser: Browser) -> str:
    found: str = browser.evaluate("document.activeElement.innerText")
    return found


def test_a_person_reads_the_page(browser: Browser, pytester: pytest.Pytester, run: Run) -> None:
    """By mouse and by keyboard; its policy refuses nothing of its own."""
    pytester.makepyfile(test_it=SUITE)
    run("--pgmonkey-report=page.html")
    browser.open(pytester.path / "page.html")
    assert len(names(browser)) == 7
    browser.click("#outcomes button[value=failed]")
    assert sorted(names(browser)) == FAILED
    browser.click("#outcomes button[value=all]")
    browser.click("#filter")
    browser.write("FROM item")
    assert names(browser) == ["test_fails"]

    browser.press("Tab")  # the outcomes
    for _ in range(5):
        browser.press("Tab")
    assert "test_fails" in focused(browser)
    browser.press("Enter")
    for _ in range(2):
        browser.press("ArrowDown")
    assert "× 30 INSERT INTO item" in focused(browser)
    browser.press("Enter")
    assert "[0, '</script><b>x'] (of the first)" in text_of(browser, ".more")
    assert "test_it.py:11" in text_of(browser, ".more")
    browser.press("Enter")
    assert browser.evaluate("document.querySelector('.more').offsetParent") is None

    browser.click(".bar.error")
    assert "! 23505: duplicate key" in focused(browser)
    assert "23505: duplicate key" in text_of(browser, ".run.error + .more")
    assert browser.evaluate("document.querySelectorAll('.track').length") == 4
    assert browser.evaluate("document.querySelectorAll('.transaction.undone').length") > 0

    browser.click("#tab-slowest")
    assert "pg_sleep" in text_of(browser, "#slowest .statement")
    browser.click("#slowest .statement")
    browser.click("#slowest .link")
    assert "test_passes" in focused(browser)
    browser.click("#tab-slowest")
    browser.press("ArrowRight")
    assert "× 30" in text_of(browser, "#repeated .statement")
    assert browser.problems == []


def test_hostile_texts_are_shown(browser: Browser, tmp_path: Path) -> None:
    """As they are, and none is run."""
    page = Page()
    page.add(shown("".join(HOSTILE), *HOSTILE, outcome="failed"))
    (tmp_path / "page.html").write_text(page.html(HOSTILE[0], HOSTILE[5]), "utf-8")
    browser.open(tmp_path / "page.html")
    browser.evaluate("document.querySelectorAll('.run').forEach((row) => row.click())")
    assert HOSTILE[0] in text_of(browser, ".name")
    assert HOSTILE[0] in text_of(browser, ".failure")
    assert HOSTILE[0] in text_of(browser, ".more")
    assert browser.evaluate("document.querySelectorAll('img, b, script').length") == 2
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert browser.problems == []


def test_many_tests_on_a_phone_in_the_dark(browser: Browser, tmp_path: Path) -> None:
    """It is as wide as the screen; a test's statements are not built before it is opened."""
    page = Page()
    for n in range(1000):
        texts = [f"SELECT {m} FROM {'a_table_with_a_long_name' * 9}" for m in range(20)]
        page.add(shown(f"tests/some/where/test_many.py::test_number[{n}]", *texts, ms=n))
    (tmp_path / "page.html").write_text(page.html("many", "now"), "utf-8")
    browser.open(tmp_path / "page.html")
    color = "getComputedStyle(document.body).backgroundColor"
    light = browser.evaluate(color)
    browser.open(tmp_path / "page.html", width=390, dark=True)
    assert browser.evaluate(color) != light
    assert browser.evaluate("document.querySelectorAll('.test').length") == 1000
    assert browser.evaluate("document.querySelectorAll('.run').length") == 0
    browser.click("summary")
    browser.click(".run")
    assert "SELECT 0 FROM" in text_of(browser, ".more")
    assert browser.evaluate("document.querySelectorAll('.run').length") == 20
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
