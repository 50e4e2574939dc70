"""How the plugin fits in: strict settings, unittest, doctest, classes, and what it costs others."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


def test_strict_markers_and_strict_config(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The marker and the ini keys are registered."""
    pytester.makeini(
        """
        [pytest]
        addopts = --strict-markers --strict-config
        pgmonkey_isolation = rollback
        pgmonkey_wait_timeout = 3
        pgmonkey_types = pool, normal
        pgmonkey_map =
            a = primary
            b = primary
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.pgmonkey
        def test_it(pgmonkey_connection):
            pass
        """
    )
    result = run("-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["pgmonkey: PostgreSQL *"])


def test_unittest_classes_with_the_marker(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """unittest.TestCase, which takes no fixtures, is in the sandbox by the marker."""
    project.makepyfile(
        """
        import unittest
        import pytest
        import app

        @pytest.mark.pgmonkey
        class TestApp(unittest.TestCase):
            def setUp(self):
                app.add("setUp")

            def tearDown(self):
                assert "setUp" in app.names()

            def test_one(self):
                app.add("one")
                self.assertEqual(["one", "setUp"], app.names())

            def test_two(self):
                self.assertEqual(["setUp"], app.names())
        """
    )
    run().assert_outcomes(passed=2)


def test_async_unittest_classes(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """IsolatedAsyncioTestCase runs the application's async side."""
    project.makepyfile(
        """
        import unittest
        import pytest
        import app

        @pytest.mark.pgmonkey
        class TestApp(unittest.IsolatedAsyncioTestCase):
            async def asyncSetUp(self):
                await app.aadd("setUp")

            async def test_one(self):
                await app.aadd("one")
                self.assertEqual(["one", "setUp"], await app.anames())

            async def test_two(self):
                self.assertEqual(["setUp"], await app.anames())
        """
    )
    run().assert_outcomes(passed=2)


def test_markers_of_modules_and_classes(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """The marker on a class or a module holds for all tests in it."""
    project.makepyfile(
        test_module="""
        import pytest
        import app

        pytestmark = pytest.mark.pgmonkey

        def test_one():
            app.add("x")
        """,
        test_class="""
        import pytest
        import app

        @pytest.mark.pgmonkey
        class TestClass:
            def test_one(self):
                app.add("x")

        def test_outside():
            with pytest.raises(Exception, match="outside of a test"):
                app.add("x")
        """,
    )
    run().assert_outcomes(passed=3)


def test_doctests_may_ask_for_the_fixture(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """A doctest gets the database by getfixture()."""
    pytester.makepyfile(
        '''
        def documented():
            """
            >>> db = getfixture("pgmonkey")
            >>> db.execute("SELECT 40 + %s", [2]).fetchone()
            (42,)
            """
        '''
    )
    run("--doctest-modules").assert_outcomes(passed=1)


def test_parametrized_and_class_scoped_fixtures_on_top(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """The user's own fixtures of any shape can build on ours."""
    project.makepyfile(
        """
        import pytest
        import app

        @pytest.fixture(scope="class")
        def names():
            return ["a", "b"]

        @pytest.fixture(params=[1, 2])
        def filled(request, pgmonkey_pool, names):
            for name in names[: request.param]:
                app.add(name)
            return request.param

        class TestIt:
            def test_one(self, filled):
                assert len(app.names()) == filled

            @pytest.mark.parametrize("n", [0, 1])
            def test_two(self, filled, n, pgmonkey_connection):
                with pgmonkey_connection as conn:
                    (count,) = conn.execute("SELECT count(*) FROM item").fetchone()
                assert count == filled
        """
    )
    run().assert_outcomes(passed=2 + 2 * 2 * 2)


def test_without_the_plugin_nothing_of_it_is_there(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """-p no:pgmonkey removes fixtures and options."""
    pytester.makepyfile("def test_it(pgmonkey): pass")
    result = run("-p", "no:pgmonkey")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'pgmonkey' not found*"])


def test_nothing_heavy_is_imported_where_no_test_asks(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """A suite without the kit pays for neither psycopg nor a server."""
    pytester.makeconftest(
        """
        import sys

        def pytest_unconfigure():
            heavy = {"psycopg", "psycopg_pool", "yaml", "testcontainers", "psycopg_binary"}
            print("heavy:", sorted(heavy & set(sys.modules)))
        """
    )
    pytester.makepyfile("def test_it(): pass")
    for args in ([], ["--collect-only"]):
        result = run("-s", *args)
        result.stdout.fnmatch_lines(["*heavy: []*"])
    pytester.makepyfile("def test_it(): pass\ndef test_db(pgmonkey): pass")
    for args in (["--collect-only"], ["-k", "test_it"]):
        result = run("-s", *args)
        result.stdout.fnmatch_lines(["*heavy: []*"])


def test_the_whole_of_a_suite_may_fail_without_noise(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Failing tests and -x leave pytest's own output readable."""
    project.makepyfile(
        """
        import app

        def test_fails(pgmonkey):
            app.add("x")
            assert app.names() == []

        def test_database_error(pgmonkey):
            pgmonkey.execute("SELECT * FROM nothing")
        """
    )
    result = run()
    result.assert_outcomes(failed=2)
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
    result.stdout.fnmatch_lines(["*UndefinedTable*"])
    run("-x").assert_outcomes(failed=1)


def test_a_refused_wait_is_in_the_report(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A thread that waited in vain is told of, with both places, although it hid the error."""
    project.makepyfile(
        """
        import threading
        import app

        def work():
            try:
                app.add("thread")
            except Exception:
                pass

        def test_it(pgmonkey):
            with pgmonkey.normal as conn:
                conn.execute("INSERT INTO item (name) VALUES ('test')")
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                assert False
        """
    )
    result = run("--pgmonkey-wait-timeout=0.2")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*borrowed at app.py:* waited 0.2 s for the one borrowed at *"])


def test_production_does_not_import_the_test_side() -> None:
    """`import pytest_pgmonkey` and every name in it need neither pytest nor testcontainers."""
    code = (
        "import sys, pytest_pgmonkey as p\n"
        "[getattr(p, name) for name in p.__all__]\n"
        "found = {'pytest', '_pytest', 'testcontainers', 'pytest_pgmonkey.testing'}\n"
        "sys.exit(repr(found & set(sys.modules)) if found & set(sys.modules) else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
