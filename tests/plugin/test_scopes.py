"""pgmonkey_module and pgmonkey_class: data shared by tests that cannot change it for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

SHARED = """
    import pytest
    import app

    @pytest.fixture(scope="module", autouse=True)
    def of_the_module(pgmonkey_module):
        pgmonkey_module.execute("INSERT INTO item (name) VALUES ('module')")

    def test_sees(pgmonkey):
        assert app.names() == ["module"]

    def test_commits(pgmonkey):
        app.add("a")
        app.add("b")
        assert app.names() == ["a", "b", "module"]

    def test_deletes(pgmonkey_normal):
        with pgmonkey_normal as conn:
            conn.execute("DELETE FROM item")
        assert app.names() == []

    def test_fails_and_rolls_back(pgmonkey_pool):
        with pytest.raises(Exception), pgmonkey_pool as conn:
            conn.execute("INSERT INTO item (name) VALUES ('x')")
            conn.execute("SELECT * FROM nothing")
        assert app.names() == ["module"]

    class TestClass:
        @pytest.fixture(scope="class", autouse=True)
        def of_the_class(self, pgmonkey_class, of_the_module):
            with pgmonkey_class.transaction():
                pgmonkey_class.execute("INSERT INTO item (name) VALUES ('class')")

        @pytest.mark.parametrize("n", [1, 2])
        def test_both(self, pgmonkey, n):
            app.add("own")
            assert app.names() == ["class", "module", "own"]

        @pytest.mark.asyncio
        async def test_async(self, pgmonkey_async_pool):
            await app.aadd("own")
            assert await app.anames() == ["class", "module", "own"]

    class TestOther:
        def test_only_the_module(self, pgmonkey):
            assert app.names() == ["module"]
"""


@pytest.mark.parametrize(
    "args", [[], ["-x"], ["-p", "no:randomly"], ["-k", "both or other"], ["--pgmonkey-types=all"]]
)
def test_module_and_class_data(
    project: pytest.Pytester, run: Callable[..., Any], args: list[str]
) -> None:
    """Tests see the data of their module and class, write, fail and roll back in between."""
    project.makepyfile(
        test_one=SHARED,
        test_two="""
        import app

        def test_clean(pgmonkey):
            assert app.names() == []
        """,
    )
    outcomes = run(*args).parseoutcomes()
    assert set(outcomes) <= {"passed", "deselected"}
    assert outcomes["passed"] >= 3


def test_clone_isolation_cannot_share(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A clone does not have uncommitted data: asking for both is an error that says so."""
    project.makepyfile(
        """
        import pytest
        import app

        def test_share(pgmonkey_module, pgmonkey):
            pgmonkey_module.execute("INSERT INTO item (name) VALUES ('m')")

        @pytest.mark.pgmonkey(isolation="clone")
        def test_both(pgmonkey_module, pgmonkey):
            pass

        @pytest.mark.pgmonkey(isolation="clone")
        def test_clone_alone(pgmonkey):
            assert app.names() == []

        def test_still_shared(pgmonkey):
            pass
        """
    )
    result = run()
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*pgmonkey_module shares uncommitted data*"])


@pytest.mark.parametrize(
    ("in_fixture", "in_test"),
    [(True, False), (False, True)],
    ids=["while data is made", "in a test"],
)
def test_the_session_of_the_data_ends(
    project: pytest.Pytester, run: Callable[..., Any], in_fixture: bool, in_test: bool
) -> None:
    """The module's other tests are told so; those of the next one do not notice."""
    project.makepyfile(
        test_one=f"""
        import pytest

        @pytest.fixture(scope="module")
        def data(pgmonkey_module):
            pgmonkey_module.execute("INSERT INTO item (name) VALUES ('module')")
            if {in_fixture}:
                pgmonkey_module.execute("SELECT pg_terminate_backend(pg_backend_pid())")

        def test_ends_it(data, pgmonkey_normal):
            with pgmonkey_normal as conn:
                if {in_test}:
                    conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

        def test_is_told(pgmonkey):
            pass

        class TestClass:
            @pytest.fixture(scope="class", autouse=True)
            def of_the_class(self, pgmonkey_class):
                pgmonkey_class.execute("INSERT INTO item (name) VALUES ('class')")

            @pytest.mark.parametrize("n", [1, 2])
            def test_is_told(self, pgmonkey, n):
                pass
        """,
        test_two="""
        import app

        def test_clean(pgmonkey):
            app.add("next")
            assert app.names() == ["next"]
        """,
    )
    result = run("-p", "no:randomly", "test_one.py", "test_two.py")
    # At the end of a test that loses it, the loss is an error besides.
    result.assert_outcomes(passed=1, failed=int(in_test), errors=4)
    told = ["*ERROR at setup of *test_is_told*", "*that it was written in*"]
    result.stdout.fnmatch_lines(3 * told)
