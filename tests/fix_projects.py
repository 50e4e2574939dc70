"""Running pytest inside pytest, as a downstream project would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from helpers.pytest_runs import QUICK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

APP = """
    from pytest_pgmonkey import PGConnectionManager

    manager = PGConnectionManager()
    pool = manager.get_database_connection("app.yaml", "pool")
    normal = manager.get_database_connection("app.yaml", "normal")

    def add(name):
        with pool as conn:
            conn.execute("INSERT INTO item (name) VALUES (%s)", [name])

    def names():
        with normal as conn:
            return [name for name, in conn.execute("SELECT name FROM item ORDER BY name")]

    async def aadd(name):
        handle = await manager.get_database_connection("app.yaml", "async_pool")
        async with handle as conn:
            await conn.execute("INSERT INTO item (name) VALUES (%s)", [name])

    async def anames():
        handle = await manager.get_database_connection("app.yaml", "async")
        async with handle as conn:
            cursor = await conn.execute("SELECT name FROM item ORDER BY name")
            return [name for name, in await cursor.fetchall()]
"""
APP_YAML = """\
connection_settings:
  host: database.invalid
  dbname: app
  user: app
pool_settings:
  min_size: 1
  max_size: 3
"""
# Not ours, and raised before any test where asyncio_default_fixture_loop_scope is unset.
_WARNINGS = ("-W", "error", "-W", "ignore::pytest.PytestDeprecationWarning")
_LIMIT = 180  # seconds
SCHEMA = (
    "CREATE TABLE item (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL);\n"
)


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run pytest in a process of its own, in the pytester directory; warnings are errors."""
    monkeypatch.delenv("CI", raising=False)

    def run(*args: str) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*QUICK, *_WARNINGS, *args, timeout=_LIMIT)

    return run


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """An application whose file names a server that does not exist, and a schema for it."""
    pytester.makepyfile(app=APP)
    (pytester.path / "app.yaml").write_text(APP_YAML, "utf-8")
    (pytester.path / "schema.sql").write_text(SCHEMA, "utf-8")
    pytester.makeini(
        """
        [pytest]
        pgmonkey_schema = schema.sql
        pythonpath = .
        """
    )
    return pytester


@pytest.fixture
def config_file(pytester: pytest.Pytester, pg_server: EmbeddedServer, database: str) -> Path:
    """A YAML file that names a database on the suite's own server."""
    path: Path = pytester.path / "server.yaml"
    path.write_text(yaml.safe_dump(pg_server.config(database)), "utf-8")
    return path
