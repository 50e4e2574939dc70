"""What a report tells of a test's statements, and budgets of them."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., pytest.RunResult]

TITLE = "- pgmonkey statements -"
FAILS = """
    import psycopg
    import pytest

    @pytest.fixture(autouse=True)
    def item(pgmonkey):
        pgmonkey.execute("CREATE TABLE item (id int PRIMARY KEY, name text)")
"""


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which nothing must be cut."""
    monkeypatch.setenv("COLUMNS", "160")


def timelines(result: pytest.RunResult) -> list[list[str]]:
    """The lines of each timeline, without those of titles; times are left out."""
    found: list[list[str]] = []
    lines = iter(result.stdout.lines)
    for line in lines:
        if TITLE not in line:
            continue
        found.append([])
        for row in lines:
            if re.match(r" *at ms +took  connection, place +statement +rows$", row):
                continue
            if not re.match(r" *(\d+\.\d |! |\(\d+ earlier)", row):
                break
            shown = re.sub(r"^ *\d+\.\d +(\d+\.\d\d)?", "", row).strip()
            found[-1].append(re.sub(" {2,}| (?=[┌│└])", "  ", shown))
    return found


# The timeline


def test_a_failed_test_tells_what_happened(pytester: pytest.Pytester, run: Run) -> None:
    """Place, connection, transaction, statement, parameters, rows and errors; runs are folded."""
    pytester.makepyfile(
        test_it=FAILS
        + """
    def test_it(pgmonkey):
        with pgmonkey.pool as conn:
            for n in range(30):
                conn.execute("INSERT INTO item VALUES (%s, %s)", [n, "x"])
            conn.execute("SELECT *\\n    FROM item WHERE id < %s", (3,))
        with pgmonkey.normal as conn:
            conn.autocommit = True
            conn.execute("DELETE FROM item")
        with pgmonkey.pool as conn:
            conn.execute("SELECT 1")
            conn.rollback()
        with pytest.raises(psycopg.Error), pgmonkey.pool as conn:
            conn.execute("SELECT 1/0")
        pgmonkey.execute("BEGIN; SELECT 2; COMMIT")
        assert 0
    """
    )
    result = run()
    result.assert_outcomes(failed=1)
    assert timelines(result) == [
        [
            "#1 test_it.py:6  CREATE TABLE item (id int PRIMARY KEY, name text)",
            "#2 test_it.py:11  ┌ × 30 INSERT INTO item VALUES (%s, %s)  [0, 'x']  1",
            "#2 test_it.py:12  │ SELECT * FROM item WHERE id < %s  (3,)  3",
            "#2 test_it.py:9  └ COMMIT",
            "#3 test_it.py:15  DELETE FROM item  30",
            "#4 test_it.py:17  ┌ SELECT 1  1",
            "#4 test_it.py:18  └ ROLLBACK",
            "#5 test_it.py:20  ┌ SELECT 1/0",
            "! 22012: division by zero",
            "#5 test_it.py:19  └ ROLLBACK",
            "#6 test_it.py:21  ┌ BEGIN",
            "#6 test_it.py:21  │ SELECT 2  1",
            "#6 test_it.py:21  └ COMMIT",
        ]
    ]


KINDS = """
    @pytest.mark.parametrize("isolation", [
        pytest.param("rollback", marks=pytest.mark.pgmonkey(isolation="rollback")),
        pytest.param("clone", marks=pytest.mark.pgmonkey(isolation="clone")),
    ])
    @pytest.mark.asyncio
    async def test_it(pgmonkey, isolation):
        with pgmonkey.normal as conn:
            conn.execute("INSERT INTO item VALUES (1)")
        async with pgmonkey.async_pool as conn:
            await conn.execute("INSERT INTO item VALUES (2)")
            await conn.rollback()
        async with pgmonkey.async_ as conn:
            await (await conn.execute("SELECT id FROM item")).fetchall()
        with psycopg.connect(pgmonkey.dsn, application_name="worker") as conn:
            conn.execute("SELECT id FROM item")
        assert 0
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer()")
def test_an_interrupted_statement_tells_what_ended_it(pytester: pytest.Pytester, run: Run) -> None:
    """A time-out by signal, for one."""
    pytester.makepyfile(
        test_it=FAILS
        + """
    import signal

    class TimeOut(BaseException):
        pass

    def ring(*_):
        raise TimeOut("after a second")

    def test_it(pgmonkey):
        before = signal.signal(signal.SIGALRM, ring)
        with pytest.raises(TimeOut), pgmonkey.normal as conn:
            signal.setitimer(signal.ITIMER_REAL, 1)
            conn.execute("SELECT pg_sleep(60)")
        signal.signal(signal.SIGALRM, before)
        assert 0
    """
    )
    result = run()
    result.assert_outcomes(failed=1)
    assert "! TimeOut: after a second" in timelines(result)[0]


def test_all_doors_in_both_isolations(pytester: pytest.Pytester, run: Run) -> None:
    """Handles of four types, and clients; what a clone's client was answered is not known."""
    pytester.makepyfile(test_it=FAILS + KINDS)
    expected = [
        "#1 test_it.py:6  CREATE TABLE item (id int PRIMARY KEY, name text)",
        "#2 test_it.py:15  ┌ INSERT INTO item VALUES (1)  1",
        "#2 test_it.py:14  └ COMMIT",
        "#3 test_it.py:17  ┌ INSERT INTO item VALUES (2)  1",
        "#3 test_it.py:18  └ ROLLBACK",
        "#4 test_it.py:20  ┌ SELECT id FROM item  1",
        "#4 test_it.py:19  └ COMMIT",
        "#5 worker (PID)  ┌ BEGIN",
        "#5 worker (PID)  │ SELECT id FROM item  1",
        "#5 worker (PID)  └ COMMIT",
    ]
    in_rollback, in_clone = (
        [re.sub(r"worker \(\d+\)", "worker (PID)", line) for line in lines]
        for lines in timelines(run())
    )
    assert in_rollback == expected
    assert in_clone == [*expected[:-2], expected[-2].removesuffix("  1"), expected[-1]]


SECRETS = """
    def test_it(pgmonkey):
        pgmonkey.execute("CREATE TABLE account (id int, password text)")
        with pytest.raises(psycopg.Error):
            pgmonkey.execute(
                "INSERT INTO account (id, password) VALUES ('hunter1', %s)", ["hunter2"]
            )
        pgmonkey.execute("UPDATE account SET password = $$hunter3$$ WHERE id = 12345")
        pgmonkey.execute("SELECT %s::text", ["shown"])
        pgmonkey.execute("SELECT %s::text", ["postgresql://u:hunter2@db/app"])
        assert 0
"""


def test_secrets_are_hidden(pytester: pytest.Pytester, run: Run) -> None:
    """Parameters, literals and the error's words, where a statement has a sensitive word."""
    pytester.makepyfile(test_it=FAILS + SECRETS)
    (lines,) = timelines(run("--tb=short"))
    assert lines[2:] == [
        "#3 test_it.py:11  INSERT INTO account (id, password) VALUES (…, %s)  …",
        "! 22P02",
        "#4 test_it.py:14  UPDATE account SET password = … WHERE id = …  0",
        "#5 test_it.py:15  SELECT %s::text  ['shown']  1",
        "#6 test_it.py:16  SELECT %s::text  ['postgresql://u:***REDACTED***@db/app']  1",
    ]
    (lines,) = timelines(run("--tb=short", "--pgmonkey-timeline-params=false"))
    assert lines[-1] == "#6 test_it.py:16  SELECT %s::text  1"


def test_nothing_in_it_can_command_a_terminal(pytester: pytest.Pytester, run: Run) -> None:
    """Control characters of statements, parameters, errors and clients are shown as escapes."""
    pytester.makepyfile(
        test_it=FAILS
        + """
    class Odd(int):
        def __repr__(self):
            return "one\\n\\x1b[31mtwo"

    def test_it(pgmonkey):
        with psycopg.connect(pgmonkey.dsn, application_name="odd") as conn:
            conn.execute("SELECT '\\x1b[31m\\x9b\\u202e'")
        with pgmonkey.pool as conn:
            conn.adapters.register_dumper(Odd, conn.adapters.get_dumper(int, "s"))
            conn.execute("SELECT %s", [Odd(1)])
        with pytest.raises(psycopg.Error):
            pgmonkey.execute("SELECT %s::int", ["\\x1b" + "w" * 1000])
        assert 0
    """
    )
    result = run("-p", "no:randomly")
    result.assert_outcomes(failed=1)
    (lines,) = timelines(result)
    shown = "\n".join(lines)
    assert "SELECT '\\x1b[31m\\x9b\\u202e'" in shown
    assert r"[one\n\x1b[31mtwo]" in shown
    assert r'! 22P02: invalid input syntax for type integer: "\x1bwww' in shown
    assert all(line.isprintable() and len(line) < 600 for line in lines)


def test_when_it_is_told(pytester: pytest.Pytester, run: Run) -> None:
    """Of failures, in whichever phase; of all tests, or of none."""
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.fixture
        def asked(pgmonkey):
            pgmonkey.execute("SELECT 1")

        def test_passes(asked):
            pass

        def test_fails(asked):
            assert 0

        def test_without():
            assert 0

        @pytest.fixture
        def late(asked):
            yield
            assert 0

        def test_ends_badly(late):
            pass

        @pytest.fixture
        def early(asked):
            assert 0

        def test_begins_badly(early):
            pass

        @pytest.mark.xfail
        def test_is_expected(asked):
            assert 0

        def test_asks_nothing(pgmonkey):
            assert 0
        """
    )
    result = run()
    result.assert_outcomes(passed=2, failed=3, errors=2, xfailed=1)
    assert len(timelines(result)) == 3
    everything = run("-rA", "--pgmonkey-timeline=always").stdout.str()
    assert everything.count(TITLE) > 3
    assert TITLE not in run("--pgmonkey-timeline=never").stdout.str()


def test_a_long_test_and_a_narrow_terminal(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last 1,000 are known, and lines are cut; what cannot be shown is not."""
    monkeypatch.setenv("COLUMNS", "80")
    pytester.makepyfile(
        """
        class Odd:
            def __repr__(self):
                raise ValueError

        def test_it(pgmonkey):
            with pgmonkey.normal as conn:
                for n in range(1200):
                    conn.execute(f"SELECT {n} AS a_name_that_takes_a_lot_of_room_on_every_line")
            assert 0
        """
    )
    result = run()
    (lines,) = timelines(result)
    assert lines[0] == "(201 earlier statements are no longer known)"
    assert len(lines) == 1001
    rows = [line for line in result.stdout.lines if "SELECT 1100" in line]
    assert len(rows[0]) <= 80
    assert "…" in rows[0]


def test_workers_tell_it(pytester: pytest.Pytester, run: Run) -> None:
    """Reports of pytest-xdist's workers have it, too."""
    pytest.importorskip("xdist", reason="needs pytest-xdist: pip install '.[dev]'")
    pytester.makepyfile(test_it=FAILS + "    def test_it(pgmonkey): assert 0\n")
    assert timelines(run("-n1")) == [
        ["#1 test_it.py:6  CREATE TABLE item (id int PRIMARY KEY, name text)"]
    ]


def test_the_second_run_of_a_refused_test(pytester: pytest.Pytester, run: Run) -> None:
    """Its statements are told, not those of the first run."""
    pytester.makepyfile(
        test_it="""
        def test_it(pgmonkey):
            pgmonkey.execute("VACUUM")
            assert 0
        """
    )
    assert timelines(run()) == [["#1 test_it.py:2  VACUUM"]]


# Budgets

BUDGETS = (
    FAILS
    + """
    import asyncio

    def work(conn):
        conn.execute("INSERT INTO item VALUES (1)")
        conn.execute("SELECT * FROM item")

    def test_what_counts(pgmonkey):
        with pgmonkey.assert_num_queries(7) as budget:
            with pgmonkey.normal as conn:
                work(conn)
                with conn.transaction():
                    conn.execute("SET LOCAL work_mem = '8MB'")
                    conn.cursor().executemany(
                        "INSERT INTO item VALUES (%s)", [(n,) for n in range(2, 9)]
                    )
                with conn.cursor().copy("COPY item FROM STDIN") as copy:
                    copy.write_row((10, "a"))
                conn.execute("SELECT set_config('a.b', 'c', false)")
                conn.execute("SHOW work_mem")
            pgmonkey.execute("BEGIN; SELECT 1; SAVEPOINT a; SELECT 2; ROLLBACK")
            with psycopg.connect(pgmonkey.dsn) as client:
                client.execute("SELECT 1")
            assert budget.count == 7

    def test_nested(pgmonkey):
        with pgmonkey.assert_num_queries(3):
            with pgmonkey.assert_max_num_queries(2), pgmonkey.normal as conn:
                work(conn)
            with pgmonkey.assert_num_queries(1):
                pgmonkey.execute("SELECT 1")
            with pgmonkey.assert_num_queries(0), pgmonkey.assert_max_num_queries(5):
                pass

    def test_more_than_are_known(pgmonkey):
        with pgmonkey.assert_num_queries(3000), pgmonkey.normal as conn:
            for _ in range(3000):
                conn.execute("SELECT 1")

    @pytest.mark.asyncio
    async def test_async(pgmonkey):
        async def one():
            async with pgmonkey.async_pool as conn:
                await conn.execute("SELECT 1")

        with pgmonkey.assert_num_queries(5):
            await asyncio.gather(*(one() for _ in range(5)))

    @pytest.mark.pgmonkey(max_queries=2)
    def test_marked(pgmonkey):
        with pgmonkey.normal as conn:
            work(conn)

    @pytest.mark.pgmonkey(max_queries=2, isolation="clone")
    @pytest.mark.asyncio
    async def test_marked_clone(pgmonkey):
        async with pgmonkey.async_ as conn:
            await conn.execute("SELECT 1")
            await conn.execute("SELECT 1")

    def test_an_error_comes_through(pgmonkey):
        with pytest.raises(KeyError), pgmonkey.assert_num_queries(1):
            raise KeyError
"""
)


def test_budgets_that_hold(pytester: pytest.Pytester, run: Run) -> None:
    """What counts, in sync and async code, nested, and however many there are."""
    pytester.makepyfile(BUDGETS)
    run().assert_outcomes(passed=7)


def test_budgets_that_do_not(pytester: pytest.Pytester, run: Run) -> None:
    """The failure has the difference, and the statements by place."""
    pytester.makepyfile(
        test_it=FAILS
        + """
    def test_many(pgmonkey):
        with pgmonkey.assert_num_queries(2), pgmonkey.normal as conn:
            for n in range(5):
                conn.execute("SELECT name FROM item WHERE id = %s", [n])
            conn.execute("DELETE FROM item")

    def test_few(pgmonkey):
        with pgmonkey.assert_num_queries(1):
            pass

    def test_most(pgmonkey):
        with pgmonkey.assert_max_num_queries(0):
            pgmonkey.execute("SELECT 'hunter2' AS password")

    @pytest.mark.pgmonkey(max_queries=1)
    def test_marked(pgmonkey):
        pgmonkey.execute("SELECT 1")
        pgmonkey.execute("SELECT 1")

    @pytest.mark.pgmonkey(max_queries=0)
    def test_fails_anyway(pgmonkey):
        pgmonkey.execute("SELECT 1")
        assert 0, "its own failure"
    """
    )
    result = run("--pgmonkey-timeline=never")
    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines(
        [
            "E*AssertionError: 6 statements ran, 2 are expected (4 too many)",
            "E * test_it.py:11  5 × SELECT name FROM item WHERE id = %s",
            "E * test_it.py:12  1 × DELETE FROM item",
            "E*AssertionError: 0 statements ran, 1 is expected (1 too few)",
            "E*AssertionError: 1 statement ran, 0 are allowed (1 too many)",
            "E * test_it.py:20  1 × SELECT … AS password",
            "@pytest.mark.pgmonkey(max_queries=1): 2 statements ran, 1 is allowed (1 too many)",
            "  test_it.py:24  1 × SELECT 1",
            "  test_it.py:25  1 × SELECT 1",
            "E*AssertionError: its own failure",
        ]
    )
    assert "hunter2" not in result.stdout.str().partition("short test summary")[2]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("-1", "max_queries=-1 is no number of statements: give 0 or more"),
        ("True", "max_queries=True is no number of statements: give 0 or more"),
        ("'2'", "max_queries='2' is no number of statements: give 0 or more"),
    ],
)
def test_a_wrong_budget(pytester: pytest.Pytester, run: Run, given: str, told: str) -> None:
    """The marker's fails the set-up, a block's raises at once."""
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.pgmonkey(max_queries={given})
        def test_marked(pgmonkey):
            pass

        def test_block(pgmonkey):
            for block in (pgmonkey.assert_num_queries, pgmonkey.assert_max_num_queries):
                with pytest.raises(ValueError, match="is no number of statements"):
                    block({given})
        """
    )
    result = run()
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines([f"@pytest.mark.pgmonkey: {told}"])


def test_wrong_options(pytester: pytest.Pytester, run: Run) -> None:
    """Each is a usage error that names the option."""
    pytester.makepyfile("def test_it(pgmonkey): pass")
    for option, told in (
        ("--pgmonkey-timeline=now", "'now' is not one of failed, always, never"),
        ("--pgmonkey-timeline-params=perhaps", "'perhaps' is neither true nor false"),
        ("--pgmonkey-n-plus-one=on", "'on' is not one of off, warn, error"),
        ("--pgmonkey-n-plus-one-threshold=0", "'0' is not a whole number above 0"),
        ("--pgmonkey-durations=-1", "'-1' is not a whole number above 0"),
    ):
        result = run(option)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"*{option.partition('=')[0]}: {told}*"])


# Repeats, and durations

LOOPS = """
    import pytest

    @pytest.fixture
    def rows(pgmonkey):
        pgmonkey.execute("CREATE TABLE item (id int)")
        for n in range(20):
            pgmonkey.execute("INSERT INTO item VALUES (%s)", [n])

    def test_reads(pgmonkey, rows):
        with pgmonkey.pool as conn:
            for n in range(12):
                conn.execute("SELECT id FROM item WHERE id = %s", [n])

    @pytest.mark.asyncio
    async def test_writes(pgmonkey, rows):
        async with pgmonkey.async_pool as conn:
            for n in range(12):
                await conn.execute("INSERT INTO item VALUES (%s)", [n])

    def test_few(pgmonkey, rows):
        for n in range(9):
            pgmonkey.execute("SELECT 1")
        with pgmonkey.pool as conn, conn.cursor() as cursor:
            cursor.executemany("INSERT INTO item VALUES (%s)", [(n,) for n in range(50)])
"""
READS = (
    "test_it.py:12 runs one statement 12 times: SELECT id FROM item WHERE id = %s "
    "(read all at once, with a join or = ANY(%s))"
)
WRITES = (
    "test_it.py:18 runs one statement 12 times: INSERT INTO item VALUES (%s) "
    "(executemany() sends all at once)"
)


@pytest.mark.parametrize("distributed", [(), ("-n1",)])
def test_repeats_are_told(
    pytester: pytest.Pytester, run: Run, distributed: tuple[str, ...]
) -> None:
    """In the summary, with place, count and a way out; those of fixtures are not."""
    pytester.makepyfile(test_it=LOOPS)
    result = run("--pgmonkey-n-plus-one=warn", *distributed)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        [
            "pgmonkey: 2 tests run a statement again and again",
            f"  test_it.py::test_reads: {READS}",
            f"  test_it.py::test_writes: {WRITES}",
        ]
    )
    if not distributed:
        assert "again and again" not in run().stdout.str()
        rows = run("--pgmonkey-n-plus-one=warn", "--pgmonkey-n-plus-one-threshold=9")
        assert "pgmonkey: 3 tests run" in rows.stdout.str()


def test_repeats_are_an_error(pytester: pytest.Pytester, run: Run) -> None:
    """Of a test that is right otherwise."""
    pytester.makepyfile(test_it=LOOPS)
    result = run("--pgmonkey-n-plus-one=error")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines([f"pgmonkey n_plus_one: {READS}", f"pgmonkey n_plus_one: {WRITES}"])


@pytest.mark.parametrize("distributed", [(), ("-n2",)])
def test_durations(pytester: pytest.Pytester, run: Run, distributed: tuple[str, ...]) -> None:
    """The slowest statements with count, total and slowest test, and the slowest tests."""
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.parametrize("n", range(3))
        def test_sleeps(pgmonkey, n):
            for _ in range(2):
                pgmonkey.execute("SELECT pg_sleep(%s)", [[0, 0.05, 0.5][n]])
            pgmonkey.execute("SELECT 1")

        def test_without():
            pass
        """
    )
    result = run("--pgmonkey-durations=2", *distributed)
    result.assert_outcomes(passed=4)
    lines = result.stdout.lines
    begin = next(n for n, line in enumerate(lines) if "= pgmonkey durations =" in line)
    shown = [" ".join(line.split()) for line in lines[begin + 1 : begin + 9]]
    assert shown[0] == "total ms count statement, and the test that spent most on it"
    assert re.fullmatch(r"\d+\.\d 6 SELECT pg_sleep\(%s\)", shown[1])
    assert shown[2] == "test_it.py::test_sleeps[2]"
    assert re.fullmatch(r"\d+\.\d 3 SELECT 1", shown[3])
    assert shown[5] == "total ms count test"
    assert re.fullmatch(r"\d+\.\d 3 test_it.py::test_sleeps\[2\]", shown[6])
    assert re.fullmatch(r"\d+\.\d 3 test_it.py::test_sleeps\[1\]", shown[7])
