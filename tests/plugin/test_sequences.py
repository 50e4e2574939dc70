"""Sequences that each test finds as the template has them."""

from __future__ import annotations

import textwrap
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_pgmonkey.testing.rollback import RollbackIsolation
from pytest_pgmonkey.testing.sandbox.psycopg_door.connections import SandboxConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

    Run = Callable[..., pytest.RunResult]

SCHEMA = """
    CREATE TABLE item (id serial PRIMARY KEY, name text);
    CREATE TABLE thing (id int GENERATED ALWAYS AS IDENTITY);
    CREATE SEQUENCE bare;
    CREATE SEQUENCE cached CACHE 20;
    CREATE SEQUENCE cached_and_moved CACHE 20;
    CREATE SEQUENCE down START -5 INCREMENT -3;
    CREATE SEQUENCE not_called START 3;
    CREATE UNLOGGED TABLE swift (id serial);
    CREATE SCHEMA "Other one";
    CREATE SEQUENCE "Other one"."Odd name" MAXVALUE 9 CYCLE;
    CREATE SEQUENCE at_its_end MAXVALUE 4;
    INSERT INTO item (name) VALUES ('a'), ('b');
    SELECT setval('not_called', 7, false), setval('at_its_end', 4), nextval('cached_and_moved');
"""
# What every test finds next, by sequence.
NEXT = {
    "item_id_seq": 3,
    "thing_id_seq": 1,
    "bare": 1,
    "cached": 1,
    "cached_and_moved": 21,
    "down": -5,
    "not_called": 7,
    "swift_id_seq": 1,
    '"Other one"."Odd name"': 1,
}
HELPERS = f"""
    import psycopg
    import pytest

    NEXT = {NEXT!r}

    def following(execute):
        return {{name: execute("SELECT nextval(%s)", [name]).fetchone()[0] for name in NEXT}}

    def add(execute):
        return execute("INSERT INTO item (name) VALUES ('x') RETURNING id").fetchone()[0]
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Callable[..., None]:
    """Write a project with a schema full of sequences, and its tests."""

    def write(tests: str, ini: str = "pgmonkey_sequences = restart") -> None:
        (pytester.path / "schema.sql").write_text(SCHEMA, "utf-8")
        pytester.makeini(
            f"[pytest]\npgmonkey_schema = schema.sql\nasyncio_mode = auto\npythonpath = .\n{ini}\n"
        )
        pytester.makepyfile(helpers=HELPERS)
        pytester.makepyfile(test_it="from helpers import *\n" + textwrap.dedent(tests))

    return write


def test_each_test_finds_them_alike(
    pytester: pytest.Pytester, suite: Callable[..., None], run: Run
) -> None:
    """Through every door, in every order; nothing of it is the test's own statement."""
    suite("""
        @pytest.mark.pgmonkey(types="all")
        @pytest.mark.parametrize("n", range(3))
        def test_handles(n, pgmonkey_connection):
            with pgmonkey_connection as conn:
                assert following(conn.execute) == NEXT
                assert following(conn.execute)["bare"] == 2

        async def test_async(pgmonkey_async, pgmonkey_async_pool):
            async with pgmonkey_async as conn:
                for name, value in NEXT.items():
                    cursor = await conn.execute("SELECT nextval(%s)", [name])
                    assert await cursor.fetchone() == (value,)
            async with pgmonkey_async_pool as conn:
                cursor = await conn.execute("SELECT nextval('cached')")
                assert await cursor.fetchone() == (2,)

        @pytest.mark.parametrize("n", range(2))
        def test_client(n, pgmonkey):
            with psycopg.connect(pgmonkey.dsn) as conn:
                assert following(conn.execute) == NEXT
            assert following(pgmonkey.execute)["bare"] == 2

        @pytest.mark.parametrize("n", range(2))
        def test_long_lived(n, pgmonkey_dsn, pgmonkey, kept):
            assert following(kept.execute) == NEXT

        @pytest.fixture(scope="session")
        def kept(pgmonkey_dsn):
            with psycopg.connect(pgmonkey_dsn, autocommit=True) as conn:
                yield conn

        def test_rollback_takes_none_back(pgmonkey):
            with pgmonkey.normal as conn:
                assert add(conn.execute) == 3
                conn.rollback()
                assert add(conn.execute) == 4

        @pytest.mark.parametrize("n", range(2))
        def test_other_ways(n, pgmonkey):
            execute = pgmonkey.execute
            with pytest.raises(psycopg.errors.SequenceGeneratorLimitExceeded):
                execute("SELECT nextval('at_its_end')")
            with pytest.raises(psycopg.Error):
                execute("SELECT currval('bare')")
            assert following(execute) == NEXT
            execute("SELECT setval('bare', 50, false), setval('at_its_end', 2)")
            execute("ALTER SEQUENCE cached RESTART WITH 100 INCREMENT 5")
            assert execute("SELECT nextval('cached')").fetchone() == (100,)
            execute("ALTER SEQUENCE cached_and_moved RENAME TO other")
            execute("TRUNCATE item RESTART IDENTITY")
            assert add(execute) == 1
            execute("DROP SEQUENCE down")
            execute("CREATE TABLE late (id serial)")
            execute("CREATE TEMPORARY TABLE short (id serial)")
            assert execute("INSERT INTO late DEFAULT VALUES RETURNING id").fetchone() == (1,)

        @pytest.fixture(scope="session")
        def role(pgmonkey_server):
            with psycopg.connect(**pgmonkey_server.admin_conninfo(), autocommit=True) as conn:
                conn.execute("CREATE ROLE nobody_else")
                conn.execute("GRANT nobody_else TO pgmonkey")

        @pytest.mark.parametrize("n", range(2))
        def test_settings(n, pgmonkey, role, pgmonkey_database):
            settings = {"role": "nobody_else", "default_transaction_read_only": "on"}
            config = {"connection_settings": {"dbname": "x"}, "sync_settings": settings}
            handle = pgmonkey.manager.get_database_connection_from_dict(config, "normal")
            with pytest.raises(psycopg.errors.InsufficientPrivilege), handle as conn:
                conn.execute("SELECT nextval('bare')")
            with handle as conn:
                assert conn.execute("SHOW transaction_read_only").fetchone() == ("on",)
            # Until another member uses the session they are in force in it.
            with psycopg.connect(pgmonkey_database.dsn, autocommit=True) as conn:
                following(conn.execute)

        @pytest.mark.pgmonkey(max_queries=1)
        def test_budget_and_record(pgmonkey):
            assert pgmonkey.execute("SELECT nextval('bare')").fetchone() == (1,)
            assert len(list(pgmonkey._kit.record.since(0))) == 1

        @pytest.mark.pgmonkey(isolation="rollback")
        def test_serializable(pgmonkey):
            with pgmonkey.normal as conn:
                conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
                assert following(conn.execute) == NEXT

        @pytest.mark.pgmonkey(isolation="clone")
        def test_clone(pgmonkey):
            assert following(pgmonkey.execute) == NEXT

        def test_moved(pgmonkey):
            assert following(pgmonkey.execute) == NEXT
            pgmonkey.execute("VACUUM item")

        @pytest.mark.pgmonkey(sequences="count")
        @pytest.mark.parametrize("n", range(2))
        def test_not_asked(n, pgmonkey):
            following(pgmonkey.execute)

        def test_ended_afterwards(pgmonkey, pgmonkey_database, request):
            following(pgmonkey.execute)
            pid = pgmonkey.execute("SELECT pg_backend_pid()").fetchone()[0]
            request.config.ended = pgmonkey_database.dsn, pid
    """)
    pytester.makeconftest("""
        import psycopg
        import pytest

        def pytest_addoption(parser):
            parser.addoption("--backwards", action="store_true")

        def pytest_collection_modifyitems(config, items):
            if config.option.backwards:
                items.reverse()

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_teardown(item):
            yield
            dsn, pid = vars(item.config).pop("ended", (None, None))
            if dsn:
                with psycopg.connect(dsn, autocommit=True) as conn:
                    conn.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    """)
    for args in ((), ("--backwards",)):
        result = run(*args)
        result.assert_outcomes(passed=29)


def test_wider_data_stays_ahead(
    pytester: pytest.Pytester, suite: Callable[..., None], run: Run
) -> None:
    """Tests go on from what a scope has used, each from the same; scopes begin as tests do."""
    suite("""
        from pytest_pgmonkey import SandboxError

        @pytest.fixture(scope="module")
        def data(pgmonkey_module):
            with pgmonkey_module.transaction():
                pgmonkey_module.execute("CREATE TABLE made (id serial PRIMARY KEY)")
                pgmonkey_module.execute("INSERT INTO made DEFAULT VALUES")
                assert add(pgmonkey_module.execute) == 3
                assert pgmonkey_module.execute("SELECT nextval('cached')").fetchone() == (1,)
            return pgmonkey_module

        @pytest.fixture(scope="class")
        def more(data, pgmonkey_class):
            pgmonkey_class.execute("INSERT INTO made DEFAULT VALUES")
            assert add(pgmonkey_class.execute) == 4
            pgmonkey_class.commit()
            return pgmonkey_class

        MADE = "INSERT INTO made DEFAULT VALUES RETURNING id"

        def check(execute, item, made):
            assert add(execute) == item
            assert add(execute) == item + 1
            assert execute(MADE).fetchone() == (made,)
            assert execute("SELECT nextval('cached'), nextval('bare')").fetchone() == (21, 1)
            execute("TRUNCATE item RESTART IDENTITY")

        def test_before(pgmonkey):
            assert following(pgmonkey.execute) == NEXT

        @pytest.mark.parametrize("n", range(3))
        def test_module(n, data, pgmonkey):
            check(pgmonkey.execute, 4, 2)

        class TestFirst:
            @pytest.mark.parametrize("n", range(2))
            def test_class(self, n, more, pgmonkey):
                check(pgmonkey.execute, 5, 3)

        class TestSecond:
            @pytest.mark.parametrize("n", range(2))
            def test_class(self, n, more, pgmonkey_normal):
                with pgmonkey_normal as conn:
                    check(conn.execute, 5, 3)

            def test_the_scope_goes_on(self, more, pgmonkey):
                check(pgmonkey.execute, 5, 3)

            @pytest.mark.pgmonkey(sequences="count")
            def test_not_asked(self, more, pgmonkey):
                check(pgmonkey.execute, 5, 3)

        class TestBetween:
            @pytest.fixture(scope="class")
            def later(self, data):
                data.execute("INSERT INTO item VALUES (DEFAULT, 'later')")

            def test_one(self, data, pgmonkey):
                check(pgmonkey.execute, 4, 2)

            @pytest.mark.parametrize("n", range(2))
            def test_two(self, n, later, pgmonkey):
                check(pgmonkey.execute, 5, 2)
    """)
    result = run("-p", "no:randomly")
    result.assert_outcomes(passed=13)


def test_clients_wider_transaction(suite: Callable[..., None], run: Run) -> None:
    """What Django's TestCase does for a class."""
    suite("""
        @pytest.fixture(scope="module")
        def conn(pgmonkey_dsn):
            with psycopg.connect(pgmonkey_dsn) as conn:
                yield conn

        class TestClass:
            @pytest.fixture(scope="class", autouse=True)
            def data(self, conn):
                assert add(conn.execute) == 3
                yield
                conn.rollback()

            @pytest.mark.parametrize("n", range(3))
            def test_inside(self, n, pgmonkey_dsn, conn):
                with conn.transaction():
                    assert add(conn.execute) == 4
                    assert add(conn.execute) == 5

        @pytest.mark.parametrize("n", range(2))
        def test_afterwards(n, pgmonkey_dsn, pgmonkey):
            assert following(pgmonkey.execute) == NEXT

        class TestAnother(TestClass):
            pass
    """)
    run().assert_outcomes(passed=8)


def test_data_that_stays(suite: Callable[..., None], run: Run) -> None:
    """Tests go on from it, in clones as well; it has the same ids whatever ran before."""
    suite(
        """
        def test_before(pgmonkey):
            assert following(pgmonkey.execute) == NEXT

        @pytest.fixture(scope="module")
        def data(pgmonkey_database):
            from pytest_pgmonkey import PGConnectionManager

            config = {"connection_settings": {"dbname": "x"}}
            handle = PGConnectionManager().get_database_connection_from_dict(config, "normal")
            with pgmonkey_database.unblock(), handle as conn:
                assert add(conn.execute) == 3
                conn.execute("CREATE SEQUENCE new")

        def check(pgmonkey, item):
            assert following(pgmonkey.execute) == {**NEXT, "item_id_seq": item}
            assert pgmonkey.execute("SELECT nextval('new')").fetchone() == (1,)

        @pytest.mark.pgmonkey(sequences="count")
        def test_not_asked(pgmonkey, data):
            following(pgmonkey.execute)

        @pytest.mark.parametrize("n", range(2))
        def test_after(n, pgmonkey, data):
            check(pgmonkey, 4)

        @pytest.mark.pgmonkey(isolation="clone")
        def test_clone(pgmonkey, data):
            check(pgmonkey, 4)

        def test_inside(pgmonkey, pgmonkey_database, data):
            check(pgmonkey, 4)
            with pgmonkey_database.unblock():
                pass

        @pytest.mark.parametrize("n", range(2))
        def test_dropped(n, pgmonkey, pgmonkey_database):
            with psycopg.connect(pgmonkey_database.dsn) as conn:
                conn.execute("DROP SEQUENCE IF EXISTS bare")  # for good, and past the kit
            assert add(pgmonkey.execute) == 5  # what test_inside has used is not known
        """
    )
    run().assert_outcomes(passed=8)


# Whatever tests do

STATE = " UNION ALL ".join(
    f"SELECT '{name}', last_value, is_called FROM {name}" for name in ("plain", "ahead", "called")
)
OPERATIONS = (
    "SELECT nextval('plain'), nextval('ahead'), nextval('called')",
    "SELECT nextval('ahead') FROM generate_series(1, 4)",
    "SELECT setval('plain', 9, false), setval('ahead', -9, false)",
    "SELECT setval('called', 3, true)",
    "SELECT setval('called', 3, false)",
    "ALTER SEQUENCE ahead RESTART",
    "ALTER SEQUENCE plain RESTART WITH 5 INCREMENT 7 CACHE 3",
    "ALTER SEQUENCE called CACHE 4",
    "ALTER SEQUENCE plain RENAME TO renamed",
    "DROP SEQUENCE called",
    "CREATE SEQUENCE mine",
    "COMMIT",
    "ROLLBACK",
    "SELECT 1/0",
)


@pytest.mark.parametrize("is_existing", [False, True], ids=["ours", "existing"])
@pytest.mark.parametrize("is_wider", [False, True], ids=["alone", "wider"])
def test_whatever_tests_do(
    pg_server: EmbeddedServer, database: str, *, is_existing: bool, is_wider: bool
) -> None:
    """Each test finds the same states and values, and no sequence of another's database moves."""
    with ExitStack() as stack:
        conninfo: Any = pg_server.conninfo(database)
        outside = stack.enter_context(psycopg.connect(**conninfo, autocommit=True))
        outside.execute(
            "CREATE SEQUENCE plain; CREATE SEQUENCE ahead INCREMENT -2 CACHE 5; "
            "CREATE SEQUENCE called; SELECT setval('called', 3)"
        )
        isolation = RollbackIsolation(
            conninfo, 5.0, lambda _: None, pg_server.log, is_existing=is_existing
        )
        stack.callback(isolation.close)
        isolation.note_sequences()
        real = outside.execute(STATE).fetchall()
        if is_wider:
            scope = isolation.open_scope(restarts=True)
            stack.callback(isolation.close_scope, scope)
            scope.connection.execute("SELECT nextval('plain'), nextval('ahead')")
        found: list[Any] = []

        @settings(
            max_examples=60,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(
            st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from(OPERATIONS))), max_size=3)
        )
        def check(tests: list[tuple[bool, list[str]]]) -> None:
            for asks, operations in tests:
                restarts = asks or is_existing or is_wider
                isolation.begin(restarts=restarts)
                with closing(isolation._sandbox.lend(SandboxConnection)) as conn:
                    if restarts:
                        found.append(
                            [conn.execute(q).fetchall() for q in (STATE, *OPERATIONS[:2], STATE)]
                        )
                    for operation in operations:
                        with suppress(psycopg.Error):
                            conn.execute(operation)
                assert isolation.end() == ([], [])
                if is_existing:
                    assert outside.execute(STATE).fetchall() == real

        check()
    assert len(found) > 20
    assert all(one == found[0] for one in found)
    if not is_wider:
        assert found[0][:2] == [real, [(1, -1, 4)]]


# A database that is not the kit's own


@pytest.fixture
def existing(config_file: Path, pg_server: EmbeddedServer, database: str) -> Iterator[Any]:
    """A connection to such a database, which a file names, with a schema full of sequences."""
    with psycopg.connect(**pg_server.conninfo(database), autocommit=True) as conn:
        conn.execute(SCHEMA)
        yield conn


def positions(conn: Any) -> dict[str, tuple[int, bool]]:
    """Where the sequences of a database stand."""
    return {
        name: conn.execute(f"SELECT last_value, is_called FROM {name}").fetchone() for name in NEXT
    }


def test_existing_database(
    suite: Callable[..., None], run: Run, config_file: Path, existing: Any
) -> None:
    """Tests move sequences of their own; those of the database stand where they stood."""
    suite(
        """
        @pytest.mark.parametrize("n", range(2))
        def test_handle(n, pgmonkey_pool):
            with pgmonkey_pool as conn:
                assert following(conn.execute) == NEXT
                conn.rollback()
                assert following(conn.execute)["bare"] == 2

        @pytest.mark.parametrize("n", range(2))
        def test_client(n, pgmonkey):
            with psycopg.connect(pgmonkey.dsn, autocommit=True) as conn:
                assert conn.execute("SHOW lock_timeout").fetchone() == ("0",)
                with pytest.raises(psycopg.errors.SequenceGeneratorLimitExceeded):
                    conn.execute("SELECT nextval('at_its_end')")
                assert following(conn.execute) == NEXT
                conn.execute("SELECT setval('bare', 70)")

        @pytest.mark.pgmonkey(sequences="count")
        def test_settings(pgmonkey):
            config = {
                "connection_settings": {"dbname": "x"},
                "sync_settings": {"default_transaction_read_only": "on"},
            }
            handle = pgmonkey.manager.get_database_connection_from_dict(config, "normal")
            with handle as conn:
                assert conn.execute("SHOW transaction_read_only").fetchone() == ("on",)

        @pytest.fixture(scope="class")
        def data(pgmonkey_class):
            assert add(pgmonkey_class.execute) == 3

        class TestWider:
            @pytest.mark.parametrize("n", range(2))
            def test_inside(self, n, data, pgmonkey):
                assert following(pgmonkey.execute) == {**NEXT, "item_id_seq": 4}

        @pytest.fixture(scope="class")
        def in_use(pgmonkey_database):
            with psycopg.connect(pgmonkey_database.dsn) as conn:
                assert conn.execute("SELECT nextval('not_called')").fetchone() == (7,)
                yield

        class TestInUse:
            def test_it(self, in_use, pgmonkey):
                pass

        def test_after(pgmonkey):
            assert following(pgmonkey.execute) == NEXT
        """,
        "pgmonkey_wait_timeout = 0.2",
    )
    before = positions(existing)
    arguments = (f"--pgmonkey-config={config_file}", "--pgmonkey-sequences=restart")
    result = run("-p", "no:randomly", "-o", "pgmonkey_schema=", *arguments)
    result.assert_outcomes(passed=8, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at setup of TestInUse.test_it*",
            "pgmonkey: the sequences of the database '*' cannot be restarted: canceling statement "
            "due to lock timeout",
        ]
    )
    assert positions(existing) == {**before, "not_called": (7, True)}


def test_what_is_refused(
    suite: Callable[..., None],
    run: Run,
    config_file: Path,
    existing: Any,
    pg_server: EmbeddedServer,
    database: str,
) -> None:
    """A role that does not own a sequence, workers that would wait for each other, wrong words."""
    suite(
        """
        @pytest.mark.pgmonkey(sequences="restart")
        def test_asks(pgmonkey):
            pass

        def test_does_not_ask(pgmonkey):
            assert following(pgmonkey.execute) == NEXT

        @pytest.mark.pgmonkey(sequences="again")
        def test_wrong_word(pgmonkey):
            pass
        """,
        ini="",
    )
    with psycopg.connect(**pg_server.admin_conninfo(database), autocommit=True) as admin:
        admin.execute("CREATE SEQUENCE other; GRANT USAGE ON SEQUENCE other TO pgmonkey")
    arguments = ("-o", "pgmonkey_schema=", f"--pgmonkey-config={config_file}")
    result = run(*arguments)
    result.assert_outcomes(passed=1, errors=2)
    told = "pgmonkey: sequences='restart': the role cannot restart the sequence public.other of "
    result.stdout.fnmatch_lines(
        [
            f"{told}the database '{database}'. Let it own it, or use sequences='count'",
            "@pytest.mark.pgmonkey: sequences 'again' is not one of count, restart",
        ]
    )
    result = run(*arguments, "-n1", "-k", "test_asks")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["pgmonkey: sequences='restart' cannot be had in an existing database under pytest-xdist:*"]
    )
    result = run(*arguments, "-n1", "--pgmonkey-database=existing", "--pgmonkey-sequences=restart")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: --pgmonkey-sequences is restart, and --pgmonkey-database existing: under pytest-*"]
    )
