"""`import_csv` and `export_csv` in tests: over all handles, and rolled back."""

from __future__ import annotations

import pytest

TESTS = """
    import asyncio
    import io

    import pytest
    from psycopg import errors
    from pytest_pgmonkey import CSVError, export_csv, import_csv

    import app

    HANDLES = [app.normal, app.pool]
    CSV = b"name\\nAnn\\n\\"B\\n,b\\"\\n"

    def copied(handle):
        import_csv(handle, io.BytesIO(CSV), table="item")
        out = io.BytesIO()
        result = export_csv(handle, out, query="SELECT name FROM item ORDER BY id")
        assert result.rows == 2
        return out.getvalue()

    @pytest.mark.parametrize("handle", HANDLES)
    def test_intercepted(pgmonkey, handle):
        assert app.names() == []
        assert copied(handle) == CSV
        assert app.names() == ["Ann", "B\\n,b"]
        app.add("later")

    @pytest.mark.pgmonkey(types="normal")
    def test_the_block_of_a_fixture(pgmonkey):
        with pgmonkey.normal as conn:
            conn.execute("INSERT INTO item (name) VALUES ('block')")
            import_csv(pgmonkey.normal, io.BytesIO(CSV), table="item")
            with pytest.raises(CSVError, match="line 2, column id"):
                import_csv(pgmonkey.normal, io.BytesIO(b"id\\nx\\n"), table="item")
            conn.execute("INSERT INTO item (name) VALUES ('and more')")
            conn.rollback()
        assert app.names() == []

    @pytest.mark.parametrize("handle", HANDLES)
    def test_refused_rows(pgmonkey, handle):
        with pytest.raises(CSVError) as caught:
            import_csv(handle, io.BytesIO(b"id,name\\n1,a\\n1,b\\n"), table="item", truncate=True)
        assert isinstance(caught.value.__cause__, errors.UniqueViolation)
        assert "line 3, column id, value 1" in str(caught.value)
        with pytest.raises(CSVError, match="read-only"):
            export_csv(handle, io.BytesIO(), query="DELETE FROM item RETURNING id")
        with pytest.raises(CSVError, match="division by zero"):
            export_csv(
                handle, io.BytesIO(), query="SELECT 1 / (9 - i) FROM generate_series(1, 9) i"
            )
        assert copied(handle) == CSV

    def test_a_new_table(pgmonkey):
        pipe = io.BytesIO(b"n,d\\n1,2024-01-31\\n")
        options = {"create_table": True, "infer_types": True}
        assert import_csv(app.pool, pipe, table="new", **options).rows == 1
        with app.normal as conn:
            query = "SELECT pg_typeof(n)::text, pg_typeof(d)::text FROM new"
            assert conn.execute(query).fetchone() == ("integer", "date")

    async def test_in_a_thread(pgmonkey):
        await app.aadd("before")
        await asyncio.to_thread(import_csv, app.pool, io.BytesIO(CSV), table="item")
        assert await app.anames() == ["Ann", "B\\n,b", "before"]

    def test_nothing_is_left(pgmonkey):
        assert app.names() == []
        with app.normal as conn:
            assert conn.execute("SELECT to_regclass('new')").fetchone() == (None,)
"""


@pytest.mark.parametrize("isolation", ["rollback", "clone"])
def test_they_join_the_test(project, run, isolation):
    """Rows are there for every handle, refused ones leave the test usable, and all is undone."""
    project.makepyfile(test_app=TESTS)

    run(f"--pgmonkey-isolation={isolation}", "-o", "asyncio_mode=auto").assert_outcomes(passed=8)
