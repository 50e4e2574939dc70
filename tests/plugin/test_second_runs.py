"""Isolation auto: what rollback cannot serve is run again in a clone, and only that run counts."""

from __future__ import annotations

import json
import sys
from datetime import date, timedelta
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import psycopg
import pytest
from helpers import refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

    Run = Callable[..., pytest.RunResult]

REFUSAL = "VACUUM cannot run inside a transaction block"
RAN = "This test ran in a clone, as rollback cannot serve it: "
#: Tells of each attempt at a test, and of what it ran in.
CONFTEST = """
    import pytest

    @pytest.fixture(autouse=True)
    def attempt(request, pgmonkey):
        name = pgmonkey.execute("SELECT current_database()").fetchone()[0]
        with open("attempts.txt", "a") as file:
            print(request.node.name, "clone" if "clone" in name else "rollback", file=file)
"""


@pytest.fixture
def cached(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest as `run` does, with pytest's cache."""
    monkeypatch.delenv("CI", raising=False)

    def run(*args: str) -> pytest.RunResult:
        options = ("-p", "no:hypothesispytest", "-p", "no:randomly", "-W", "error")
        return pytester.runpytest_subprocess(
            *options, "-W", "ignore::pytest.PytestDeprecationWarning", *args, timeout=180
        )

    return run


@pytest.fixture
def attempts(pytester: pytest.Pytester) -> Callable[[], list[str]]:
    """Give what was attempted since it was last asked: the test's name and what it ran in."""
    pytester.makeconftest(CONFTEST)
    file = pytester.path / "attempts.txt"

    def read() -> list[str]:
        found = file.read_text("utf-8").splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return found

    return read


@pytest.fixture
def scratch(pg_server: EmbeddedServer, config_file: Path) -> Iterator[tuple[str, ...]]:
    """Options that lead to scratch databases of a configured server."""
    user = pg_server.conninfo("x")["user"]
    with psycopg.connect(**pg_server.admin_conninfo("postgres"), autocommit=True) as admin:
        admin.execute(f"ALTER ROLE {user} CREATEDB")
        yield ("--pgmonkey-config", str(config_file), "--pgmonkey-database=scratch")
        admin.execute(f"ALTER ROLE {user} NOCREATEDB")


def summary(result: pytest.RunResult) -> list[str]:
    """The line that tells of clones, with what is below it."""
    lines = result.stdout.lines
    at = [n for n, line in enumerate(lines) if line.startswith("pgmonkey: ") and "clone" in line]
    assert len(at) <= 1
    return lines[at[0] :] if at else []


# A suite that mixes them


@pytest.mark.parametrize("source", ["embedded", "scratch", "distributed"])
def test_a_newcomer_s_suite(
    pytester: pytest.Pytester, cached: Run, scratch: tuple[str, ...], source: str
) -> None:
    """It passes with no marker, in the first run and in the second."""
    pytester.makepyfile(refused.MIXED)
    options = {
        "embedded": (),
        "scratch": scratch,
        "distributed": ("-n2",),
    }[source]
    for _ in range(2):
        result = cached(*options, "-q")
        result.assert_outcomes(passed=refused.ALL)
        number = refused.MOVED
        line = f"pgmonkey: {number} tests ran in clones, rollback cannot serve them"
        assert summary(result)[0] == line


def test_it_fails_where_it_should(pytester: pytest.Pytester, run: Run) -> None:
    """A wrong assertion is reported once, from the clone, with what was refused."""
    pytester.makepyfile(refused.wrong())
    result = run("-q", "-k", "not plain")
    in_fixtures_end = 1  # it has no assertion
    failed = refused.MOVED - in_fixtures_end
    result.assert_outcomes(failed=failed, passed=2)
    text = result.stdout.str()
    assert text.count(RAN) == failed
    assert text.count("- pgmonkey isolation -") == failed
    # What the first run has raised is nowhere.
    assert "real transactions with @pytest.mark" not in text
    assert "dbname=tests" not in text


def test_what_is_refused_in_words(pytester: pytest.Pytester, run: Run) -> None:
    """With -v the summary has each test with the reason, and says how to mark them."""
    pytester.makepyfile(refused.MIXED)
    lines = summary(run("-v", "-k", "vacuum or two_phase or two_writers"))
    file = "test_what_is_refused_in_words.py::test_"
    assert lines[0] == "pgmonkey: 6 tests ran in clones, rollback cannot serve them"
    assert f"  {file}vacuum: {REFUSAL}" in lines
    two_phase = "two-phase commit would end the transaction that the test is rolled back with"
    assert f"  {file}two_phase[1]: {two_phase}" in lines
    assert any("changes that are not committed" in line for line in lines)
    assert 'pgmonkey(isolation="clone")' in lines[7]


def test_one_test_in_words(pytester: pytest.Pytester, run: Run) -> None:
    """The line is for one, too, and not there for none."""
    pytester.makepyfile(refused.MIXED)
    lines = summary(run("-k", "test_vacuum"))
    assert lines[0] == "pgmonkey: 1 test ran in a clone, rollback cannot serve it"
    assert not summary(run("-k", "no_refusal"))


# What a second run has, and what others see of it

PHASES = """
    import logging
    import os
    import unittest

    import psycopg
    import pytest

    def vacuum(pgmonkey):
        pgmonkey.execute("VACUUM")

    @pytest.fixture(autouse=True)
    def told(request, attempt):
        found = str(request.getfixturevalue("pgmonkey"))
        request.node.user_properties.append(("attempt", found))

    def test_output(pgmonkey, capsys):
        print("said")
        vacuum(pgmonkey)
        assert capsys.readouterr().out == "said\\n"

    def test_log(pgmonkey, caplog):
        logging.warning("logged")
        vacuum(pgmonkey)
        assert len(caplog.records) == 1

    def test_environment(pgmonkey, monkeypatch):
        assert "SET_BY_TEST" not in os.environ
        monkeypatch.setenv("SET_BY_TEST", "1")
        vacuum(pgmonkey)

    def test_directory(pgmonkey, tmp_path):
        assert not list(tmp_path.iterdir())
        (tmp_path / "file").touch()
        vacuum(pgmonkey)

    def test_by_name(request):
        vacuum(request.getfixturevalue("pgmonkey"))

    class TestClass:
        def setup_method(self):
            self.begun = []

        def test_method(self, pgmonkey):
            assert not self.begun
            self.begun.append(1)
            vacuum(pgmonkey)

    class TestUnit(unittest.TestCase):
        @pytest.fixture(autouse=True)
        def database(self, pgmonkey):
            self.pgmonkey = pgmonkey

        def setUp(self):
            self.begun = []

        def test_unit(self):
            self.assertEqual(self.begun, [])
            self.begun.append(1)
            vacuum(self.pgmonkey)

    @pytest.mark.asyncio
    async def test_asyncio(pgmonkey):
        vacuum(pgmonkey)

    @pytest.fixture
    def anyio_backend():
        return "asyncio"

    @pytest.mark.anyio
    async def test_anyio(pgmonkey, anyio_backend):
        vacuum(pgmonkey)

    def test_skips(pgmonkey):
        try:
            vacuum(pgmonkey)
        except psycopg.Error:
            pytest.skip("not in a clone")

    def test_skips_in_a_clone(pgmonkey):
        vacuum(pgmonkey)
        pytest.skip("it cannot go on")

    @pytest.mark.xfail(strict=True, raises=AssertionError)
    def test_fails_as_expected(pgmonkey):
        vacuum(pgmonkey)
        assert False

    @pytest.mark.xfail(raises=psycopg.Error)
    def test_passes_unexpectedly(pgmonkey):
        vacuum(pgmonkey)
"""


def test_other_plugins_see_one_test(
    pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]
) -> None:
    """Function fixtures are new, and what others write has the second run alone."""
    pytester.makepyfile(PHASES)
    result = run("--junitxml=report.xml")
    result.assert_outcomes(passed=10, skipped=1, xfailed=1, xpassed=1)
    found = attempts()
    assert found[::2] == [line.removesuffix("clone") + "rollback" for line in found[1::2]]
    tests = ET.parse(pytester.path / "report.xml").getroot().iter("testcase")
    for test in tests:
        properties = [each.get("value") or "" for each in test.iter("property")]
        assert len(properties) == 1
        assert "clone" in properties[0]


def test_a_report_is_of_the_second_run(
    pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]
) -> None:
    """So are output, log and durations."""
    pytester.makepyfile(
        """
        import logging
        import time
        import unittest
        import pytest

        def say(text, pgmonkey):
            name = pgmonkey.execute("SELECT current_database()").fetchone()[0]
            print(text, "in", name)
            logging.warning("%s in %s", text, name)

        def test_wrong(pgmonkey):
            say("first", pgmonkey)
            if "clone" not in str(pgmonkey):
                time.sleep(3)
            pgmonkey.execute("VACUUM")
            say("then", pgmonkey)
            assert 0

        class TestUnit(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def database(self, pgmonkey):
                self.pgmonkey = pgmonkey

            def test_unit(self):
                say("first", self.pgmonkey)
                self.pgmonkey.execute("VACUUM")
                say("then", self.pgmonkey)
                self.fail("once")
        """
    )
    result = run("--durations=0", "-vv")
    result.assert_outcomes(failed=2)
    text = result.stdout.str()
    # Printed and logged, by both.
    assert text.count("first in clone") == text.count("then in clone") == 4
    assert "in tests" not in text
    assert text.count("E       AssertionError: once") == 1
    (line,) = [line for line in result.stdout.lines if "s call " in line and "test_wrong" in line]
    assert float(line.partition("s")[0]) < 3


def test_a_run_that_is_stopped(pytester: pytest.Pytester, run: Run) -> None:
    """Whoever stops the run in the first or in the second attempt stops it."""
    pytester.makepyfile(
        """
        import psycopg
        import pytest

        def test_first(pgmonkey):
            if "clone" not in str(pgmonkey):
                try:
                    pgmonkey.execute("VACUUM")
                except psycopg.Error:
                    pytest.exit("by the first")

        def test_second(pgmonkey):
            pgmonkey.execute("VACUUM")
            pytest.exit("by the second")
        """
    )
    for name in ("first", "second"):
        result = run("-k", name)
        assert f"by the {name}" in result.stdout.str()
        result.assert_outcomes()


def test_subtests(
    pytester: pytest.Pytester, cached: Run, attempts: Callable[[], list[str]]
) -> None:
    """They are reported while the test runs: the next run starts it in a clone."""
    pytester.makepyfile(
        """
        def test_parts(pgmonkey, subtests):
            for query in ("SELECT 1", "VACUUM"):
                with subtests.test(query):
                    pgmonkey.execute(query)
        """
    )
    first = cached()
    assert first.ret == 1
    assert attempts() == ["test_parts rollback"]
    assert f"its next run begins in a clone: {REFUSAL}" in first.stdout.str()
    assert not summary(first)
    second = cached()
    assert second.ret == 0
    assert attempts() == ["test_parts clone"]
    assert summary(second)


def test_hypothesis(pytester: pytest.Pytester) -> None:
    """All examples of the second run are in one clone; a wrong one is found there."""
    pytest.importorskip("hypothesis", reason="needs hypothesis: pip install '.[dev]'")
    pytester.makepyfile(
        """
        from hypothesis import HealthCheck, given, settings, strategies as st

        quick = settings(
            max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture],
            deadline=None,
        )

        @quick
        @given(st.integers())
        def test_right(pgmonkey, n):
            pgmonkey.execute("VACUUM")

        class TestClass:
            @quick
            @given(n=st.integers())
            def test_wrong(self, pgmonkey, n):
                pgmonkey.execute("VACUUM")
                assert n < 100
        """
    )
    options = ("-p", "no:cacheprovider", "-p", "no:randomly", "-W", "error")
    result = pytester.runpytest_subprocess(
        *options, "-W", "ignore::pytest.PytestDeprecationWarning", timeout=180
    )
    result.assert_outcomes(passed=1, failed=1)
    assert "assert 100 < 100" in result.stdout.str()


def test_beside_reruns(
    pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]
) -> None:
    """A test that is run again for another reason begins in a clone at once."""
    pytest.importorskip("pytest_rerunfailures", reason="needs pytest-rerunfailures")
    pytester.makepyfile(
        """
        attempts = []

        def test_flaky(pgmonkey):
            pgmonkey.execute("VACUUM")
            attempts.append(1)
            assert len(attempts) == 3

        def test_wrong(pgmonkey):
            pgmonkey.execute("VACUUM")
            assert 0
        """
    )
    result = run("-p", "no:randomly", "--reruns=2")
    result.assert_outcomes(passed=1, failed=1)
    assert "4 rerun" in result.stdout.str()
    first = ["test_flaky rollback", *["test_flaky clone"] * 3]
    assert attempts() == [*first, *[line.replace("flaky", "wrong") for line in first]]


# What is remembered

ONE = """
    import pytest

    def test_vacuum(pgmonkey):
        pgmonkey.execute("VACUUM")

    def test_plain(pgmonkey):
        pass
"""
AGAIN = ["test_vacuum rollback", "test_vacuum clone", "test_plain rollback"]
AT_ONCE = AGAIN[1:]


def memory(pytester: pytest.Pytester) -> Path:
    return pytester.path / ".pytest_cache" / "v" / "pgmonkey" / "clones"


def test_a_test_is_remembered(
    pytester: pytest.Pytester, cached: Run, attempts: Callable[[], list[str]]
) -> None:
    """Until the cache is cleared; without a cache it is not."""
    pytester.makepyfile(ONE)
    for options, expected in (
        (["-p", "no:cacheprovider"], AGAIN),
        ([], AGAIN),
        ([], AT_ONCE),
        (["--lf"], AT_ONCE),
        (["--sw"], AT_ONCE),
        (["-n1", "-p", "xdist"], AT_ONCE),
        (["--pgmonkey-isolation=rollback"], [AGAIN[0], AGAIN[2]]),
        (["--cache-clear"], AGAIN),
        ([], AT_ONCE),
    ):
        result = cached(*options)
        assert attempts() == expected
        assert bool(summary(result)) == ("clone" in str(expected))


def test_it_is_tried_again_after_a_month(
    pytester: pytest.Pytester, cached: Run, attempts: Callable[[], list[str]]
) -> None:
    """What it needed a clone for may be gone."""
    pytester.makepyfile(ONE)
    cached()
    known = json.loads(memory(pytester).read_text("utf-8"))
    for days, expected in ((29, AT_ONCE), (31, AGAIN), (0, AT_ONCE)):
        attempts()
        if days:
            day = (date.today() - timedelta(days=days)).isoformat()
            old = {key: [reason, day] for key, (reason, _) in known.items()}
            memory(pytester).write_text(json.dumps(old), "utf-8")
        cached()
        assert attempts() == expected


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1, "test_a.py::x": ["b"]}', '{"a": [1, 2]}'])
def test_a_memory_that_somebody_has_edited(
    pytester: pytest.Pytester, cached: Run, attempts: Callable[[], list[str]], content: str
) -> None:
    """What is not understood is not known."""
    pytester.makepyfile(ONE)
    memory(pytester).parent.mkdir(parents=True)
    memory(pytester).write_text(content, "utf-8")
    for expected in (AGAIN, AT_ONCE):
        cached().assert_outcomes(passed=2)
        assert attempts() == expected


def test_workers_share_the_memory(
    pytester: pytest.Pytester, cached: Run, attempts: Callable[[], list[str]]
) -> None:
    """Whichever worker runs a test, and with groups in its name."""
    pytest.importorskip("xdist", reason="needs pytest-xdist: pip install '.[dev]'")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("n", range(4))
        def test_vacuum(pgmonkey, n):
            pgmonkey.execute("VACUUM")

        @pytest.mark.xdist_group("late")
        def test_grouped(pgmonkey):
            pgmonkey.execute("VACUUM")
        """
    )
    line = "pgmonkey: 5 tests ran in clones, rollback cannot serve them"
    for options, number in (
        (["-n2", "--dist=loadgroup"], 10),
        (["-n2"], 5),
        ([], 5),
        (["-n2", "--dist=loadgroup"], 5),
    ):
        result = cached(*options)
        result.assert_outcomes(passed=5)
        assert len(attempts()) == number
        assert summary(result)[0] == line


# Which tests do not move


def test_tests_that_stay(
    pytester: pytest.Pytester,
    run: Run,
    attempts: Callable[[], list[str]],
) -> None:
    """What is marked, and what shares data that no clone has, fails with the advice."""
    pytester.makepyfile(
        """
        import psycopg
        import pytest

        def refused(pgmonkey):
            with pytest.raises(psycopg.Error, match="isolation=.clone."):
                pgmonkey.execute("VACUUM")

        @pytest.mark.pgmonkey(isolation="rollback")
        def test_marked(pgmonkey):
            pgmonkey.execute("LISTEN it")
            refused(pgmonkey)

        def test_of_a_module(pgmonkey_module, pgmonkey):
            pgmonkey.execute("LISTEN it")
            refused(pgmonkey)

        class TestClass:
            def test_of_a_class(self, pgmonkey_class, pgmonkey):
                refused(pgmonkey)

        def test_beside(pgmonkey):
            pgmonkey.execute("VACUUM")
        """
    )
    result = run()
    result.assert_outcomes(passed=4)
    assert attempts() == [
        "test_marked rollback",
        "test_of_a_module rollback",
        "test_of_a_class rollback",
        "test_beside rollback",
        "test_beside clone",
    ]


def test_an_existing_database(
    pytester: pytest.Pytester, cached: Run, config_file: Path, attempts: Callable[[], list[str]]
) -> None:
    """It is never copied unasked, also where another run remembers the test."""
    pytester.makepyfile(ONE)
    cached()
    attempts()
    result = cached("--pgmonkey-config", str(config_file))
    result.assert_outcomes(passed=1, failed=1)
    assert attempts() == ["test_vacuum rollback", "test_plain rollback"]
    assert 'isolation="clone"' in result.stdout.str()
    assert not summary(result)


def test_the_marker_asks_for_it(
    pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]
) -> None:
    """Where the option says rollback."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.pgmonkey(isolation="auto")
        def test_moves(pgmonkey):
            pgmonkey.execute("VACUUM")

        def test_stays(pgmonkey):
            pgmonkey.execute("VACUUM")
        """
    )
    run("--pgmonkey-isolation=rollback").assert_outcomes(passed=1, failed=1)
    assert attempts() == ["test_moves rollback", "test_moves clone", "test_stays rollback"]


def test_plain_failures_do_not_move(
    pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]
) -> None:
    """Nothing flaky is hidden."""
    pytester.makepyfile(
        """
        import psycopg

        def test_wrong(pgmonkey):
            assert 0

        def test_an_error(pgmonkey):
            pgmonkey.execute("SELECT 1/0")

        def test_a_failed_call(pgmonkey, late):
            assert 0
        """
    )
    conftest = pytester.path / "conftest.py"
    late = """
@pytest.fixture
def late(pgmonkey):
    yield
    pgmonkey.execute("VACUUM")
"""
    conftest.write_text(conftest.read_text("utf-8") + late, "utf-8")
    result = run()
    # The last one was reported before it was refused.
    result.assert_outcomes(failed=3, errors=1)
    assert all(line.endswith("rollback") for line in attempts())
    assert "its next run begins in a clone" in result.stdout.str()


def test_data_of_a_module_before_a_clone(pytester: pytest.Pytester, run: Run) -> None:
    """A test that does not share it moves, and finds nothing of it."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture(scope="module", autouse=True)
        def shared(request):
            conn = request.getfixturevalue("pgmonkey_module")
            conn.execute("CREATE TABLE shared (n int)")

        def test_moves(pgmonkey):
            pgmonkey.execute("VACUUM")
            (table,) = pgmonkey.execute("SELECT to_regclass('shared')").fetchone()
            assert table is None
        """
    )
    run().assert_outcomes(passed=1)


# Waits


def test_waits_are_short(
    pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]
) -> None:
    """The first one of a test counts after half a second, the others at once."""
    pytester.makepyfile(
        """
        import threading

        def test_waits(pgmonkey):
            if "clone" in str(pgmonkey):
                return
            waits = []

            def write():
                try:
                    with pgmonkey.normal as conn:
                        conn.execute("SELECT 1")
                except Exception as error:
                    waits.append(str(error))

            with pgmonkey.pool as conn:
                conn.execute("CREATE TABLE t (n int)")
                for _ in range(3):
                    thread = threading.Thread(target=write)
                    thread.start()
                    thread.join()
            first, *others = waits
            assert "waited 0.5 s" in first and len(others) == 2
            assert all("waited 0 s" in other for other in others)
            with open("told", "w"):
                pass
        """
    )
    run("--pgmonkey-wait-timeout=60").assert_outcomes(passed=1)
    assert (pytester.path / "told").exists()


# The option confirm


def test_confirm(pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]) -> None:
    """A plain failure stays one; its report says whether the test passes in a clone."""
    pytester.makepyfile(
        """
        import unittest
        import pytest

        def now(pgmonkey):
            return pgmonkey.execute("SELECT now()").fetchone()

        def test_now(pgmonkey):
            print("said", "once")
            assert now(pgmonkey) != now(pgmonkey)

        class TestUnit(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def database(self, pgmonkey):
                self.pgmonkey = pgmonkey

            def test_unit(self):
                self.assertNotEqual(now(self.pgmonkey), now(self.pgmonkey))

        def test_wrong(pgmonkey):
            assert 0, "it is wrong"

        @pytest.fixture
        def wrong(pgmonkey):
            assert 0, "it is wrong"

        def test_wrong_fixture(wrong):
            pass

        def test_passes(pgmonkey):
            pass

        def test_skips(pgmonkey):
            pytest.skip("here")

        @pytest.mark.xfail
        def test_xfails(pgmonkey):
            assert 0

        @pytest.mark.pgmonkey(isolation="clone")
        def test_cloned(pgmonkey):
            assert 0

        def test_shares(pgmonkey_module, pgmonkey):
            assert 0
        """
    )
    result = run("--pgmonkey-confirm")
    result.assert_outcomes(failed=5, errors=1, passed=1, skipped=1, xfailed=1)
    text = result.stdout.str()
    assert text.count("It passes in a clone: look at now(), sequences, locks.") == 2
    assert text.count("It fails in a clone, too: AssertionError: it is wrong") == 2
    assert text.count("said once") == 1
    assert not summary(result)
    assert sorted(line for line in attempts() if "clone" in line) == [
        "test_cloned clone",
        "test_now clone",
        "test_unit clone",
        "test_wrong clone",
        "test_wrong_fixture clone",
    ]


def test_confirm_is_off(
    pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]
) -> None:
    """Unless it is asked for."""
    pytester.makepyfile("def test_wrong(pgmonkey): assert 0")
    run().assert_outcomes(failed=1)
    assert attempts() == ["test_wrong rollback"]


# Nothing is paid for what nobody needs


def test_no_clone_without_a_refusal(pytester: pytest.Pytester, run: Run) -> None:
    """No database is made for it."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture(scope="session", autouse=True)
        def databases(pgmonkey_server, pgmonkey_database):
            yield
            import psycopg
            with psycopg.connect(pgmonkey_server.admin_dsn) as conn:
                found = conn.execute("SELECT datname FROM pg_database").fetchall()
            assert not [name for name, in found if "clone" in name or "original" in name]

        @pytest.mark.parametrize("n", range(3))
        def test_plain(pgmonkey, n):
            pgmonkey.execute("CREATE TABLE t (n int)")
        """
    )
    run().assert_outcomes(passed=3)


def test_a_kept_database_is_the_clone_s(
    pytester: pytest.Pytester,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    scratch: tuple[str, ...],
) -> None:
    """Of a test that was moved and has failed there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pytester.makepyfile(
        """
        def test_wrong(pgmonkey):
            pgmonkey.execute("CREATE TABLE IF NOT EXISTS t (n int)")
            pgmonkey.execute("VACUUM t")
            assert 0
        """
    )
    result = run("--pgmonkey-keep=failed", *scratch)
    result.assert_outcomes(failed=1)
    (line,) = [line for line in result.stdout.lines if "pgmonkey kept --remove" in line]
    command = [sys.executable, "-m", "pytest_pgmonkey", *line.split()[1:]]
    assert pytester.run(*command).ret == 0


WIDER = """
    import pytest

    @pytest.fixture(scope="session")
    def of_the_session():
        print("\\nsession begins")
        yield
        print("\\nsession ends")

    @pytest.fixture(scope="module")
    def of_the_module(of_the_session):
        print("\\nmodule begins")
        yield
        print("\\nmodule ends")

    @pytest.fixture
    def vacuums(pgmonkey):
        yield
        print("\\ntest ends")
        pgmonkey.execute("VACUUM")

    def test_last(of_the_module, vacuums):
        pass
"""


@pytest.mark.parametrize("swallows", [False, True])
def test_wider_fixtures_stay_where_a_teardown_is_refused(
    pytester: pytest.Pytester, run: Run, swallows: bool
) -> None:
    """Also in the last test of a module and of the session, which ends them."""
    text = WIDER
    if swallows:
        text = text.replace(
            'pgmonkey.execute("VACUUM")',
            'with __import__("contextlib").suppress(Exception): pgmonkey.execute("VACUUM")',
        )
    pytester.makepyfile(text)
    result = run("-s")
    result.assert_outcomes(passed=1)
    told = [line for line in result.stdout.lines if line.endswith((" begins", " ends"))]
    assert told == [
        "session begins",
        "module begins",
        "test ends",
        "test ends",
        "module ends",
        "session ends",
    ]


def test_a_teardown_that_fails_by_itself(pytester: pytest.Pytester, run: Run) -> None:
    """It ends the wider fixtures as ever, and is reported once."""
    pytester.makepyfile(WIDER.replace('pgmonkey.execute("VACUUM")', "assert 0, 'in the teardown'"))
    result = run("-s")
    result.assert_outcomes(passed=1, errors=1)
    text = result.stdout.str()
    assert text.count("E       AssertionError: in the teardown") == 1
    assert "session ends" in text


def test_nothing_of_the_first_run_is_kept_alive(pytester: pytest.Pytester, run: Run) -> None:
    """A pool of one has its connection back, which the first run's error would hold."""
    pytester.makepyfile(
        """
        import weakref
        import pytest

        class Resource:
            free = True

            def __init__(self):
                assert Resource.free
                Resource.free = False

            def __del__(self):
                Resource.free = True

        def test_holds(pgmonkey):
            resource = Resource()
            pgmonkey.execute("VACUUM")
        """
    )
    run().assert_outcomes(passed=1)


def test_a_time_out(
    pytester: pytest.Pytester, cached: Run, attempts: Callable[[], list[str]]
) -> None:
    """Its timer has gone off, so there is none for a second run: the next run is in a clone."""
    pytest.importorskip("pytest_timeout", reason="needs pytest-timeout: pip install '.[dev]'")
    pytester.makepyfile(
        """
        import threading

        import psycopg
        import pytest

        def test_warm(pgmonkey):
            pass  # the server's start has no limit

        @pytest.mark.timeout(5)
        def test_hangs(pgmonkey):
            try:
                pgmonkey.execute("VACUUM")
            except psycopg.Error:
                threading.Event().wait()
        """
    )
    first = cached()
    first.assert_outcomes(passed=1, failed=1)
    assert "Timeout" in first.stdout.str()
    assert "its next run begins in a clone" in first.stdout.str()
    assert attempts() == ["test_warm rollback", "test_hangs rollback"]
    cached().assert_outcomes(passed=2)
    assert attempts() == ["test_warm rollback", "test_hangs clone"]


def test_a_test_that_asks_by_name(pytester: pytest.Pytester, cached: Run) -> None:
    """The first one of a run in which none names a fixture moves from the next run on."""
    pytester.makepyfile(
        """
        def test_first(request):
            request.getfixturevalue("pgmonkey").execute("VACUUM")

        def test_second(request):
            request.getfixturevalue("pgmonkey").execute("VACUUM")
        """
    )
    first = cached()
    first.assert_outcomes(failed=1, passed=1)
    assert "its next run begins in a clone" in first.stdout.str()
    cached().assert_outcomes(passed=2)


def test_outcomes_of_a_refused_teardown(
    pytester: pytest.Pytester, run: Run, attempts: Callable[[], list[str]]
) -> None:
    """The test is counted once; what fails in the second run is the teardown's."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def vacuums(pgmonkey):
            yield
            pgmonkey.execute("VACUUM")

        @pytest.mark.xfail(strict=True)
        def test_is_expected(vacuums):
            assert 0

        def test_skips(vacuums, pgmonkey):
            if "clone" in str(pgmonkey):
                pytest.skip("there")

        def test_fails(vacuums, pgmonkey):
            assert "clone" not in str(pgmonkey)
        """
    )
    result = run()
    result.assert_outcomes(passed=2, xfailed=1, errors=1)
    assert len(attempts()) == 6


def test_data_for_every_test_from_within_one(pytester: pytest.Pytester, run: Run) -> None:
    """Later clones have it: they are copied anew."""
    pytester.makepyfile(
        """
        import psycopg
        import pytest

        @pytest.mark.pgmonkey(isolation="clone")
        def test_writes(pgmonkey, pgmonkey_database):
            pgmonkey.execute("CREATE TABLE own ()")
            with pgmonkey_database.unblock(), psycopg.connect(pgmonkey_database.dsn) as conn:
                conn.execute("CREATE TABLE common ()")

        @pytest.mark.parametrize("n", range(3))
        def test_finds(pgmonkey, n):
            pgmonkey.execute("VACUUM common")
        """
    )
    run("-p", "no:randomly").assert_outcomes(passed=4)


def test_a_time_out_in_a_refused_teardown(pytester: pytest.Pytester, run: Run) -> None:
    """Wider fixtures end as ever, though the test is not run again."""
    pytest.importorskip("pytest_timeout", reason="needs pytest-timeout: pip install '.[dev]'")
    pytester.makepyfile(
        """
        import threading

        import psycopg
        import pytest

        @pytest.fixture(scope="module")
        def of_the_module():
            yield
            print("the module ends")

        @pytest.fixture
        def hangs(pgmonkey):
            yield
            try:
                pgmonkey.execute("VACUUM")
            except psycopg.Error:
                threading.Event().wait()

        def test_warm(pgmonkey):
            pass

        @pytest.mark.timeout(5)
        def test_hangs(of_the_module, hangs):
            pass
        """
    )
    result = run("-s", "-p", "no:randomly")
    result.assert_outcomes(passed=2, errors=1)
    assert "the module ends" in result.stdout.str()
