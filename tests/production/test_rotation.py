"""Passwords that change while handles live: secret files, and functions of a pool."""

# What raises is the block itself.

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers.four_types import ALL, POOLS, block, call, pid, value
from helpers.waiting import until
from psycopg.conninfo import make_conninfo

from pytest_pgmonkey import EnvInterpolationError, PGConnectionManager
from pytest_pgmonkey.config import resolved_spec
from pytest_pgmonkey.testing.file_settings import in_clone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from helpers.servers import TLSServer

ROLE = "rotated"


class Rotated:
    """A role whose password changes, and the file that holds it."""

    def __init__(self, server: TLSServer, admin: Any, file: Path) -> None:
        self.settings: dict[str, Any] = server.conninfo(user=ROLE)
        del self.settings["password"]
        self.file = file
        self._admin = admin
        self.rotate("first")

    def rotate(self, password: str) -> None:
        self.password = password
        self.write(password)
        self._admin.execute(
            psycopg.sql.SQL("ALTER ROLE {} PASSWORD {}").format(
                psycopg.sql.Identifier(ROLE), psycopg.sql.Literal(password)
            )
        )

    def write(self, text: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(f"{text}\n", "utf-8")
        new.replace(self.file)

    def end_sessions(self) -> set[int]:
        query = "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s"
        return {number for number, _ in self._admin.execute(query, [ROLE])}

    def config(self, **pool: Any) -> dict[str, Any]:
        settings = {**self.settings, "password": {"from_file": str(self.file)}}
        pool = {"min_size": 1, "max_size": 4, **pool}
        return {
            "connection_settings": settings,
            "pool_settings": pool,
            "async_pool_settings": pool,
        }


@pytest.fixture
def rotated(tls_server: TLSServer, tmp_path: Path) -> Iterator[Rotated]:
    with psycopg.connect(**tls_server.admin_conninfo(), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {ROLE} LOGIN")
        role = Rotated(tls_server, admin, tmp_path / "password")
        yield role
        role.end_sessions()
        admin.execute(f"DROP ROLE {ROLE}")


def ask(manager: PGConnectionManager, config: Any, type_: str, **options: Any) -> Any:
    return manager.get_database_connection_from_dict(config, type_, resolve_env=True, **options)


@pytest.mark.asyncio
@pytest.mark.parametrize("type_", ALL)
@pytest.mark.parametrize("as_dsn", [False, True])
async def test_a_new_password_needs_no_restart(
    manager: PGConnectionManager, rotated: Rotated, type_: str, as_dsn: bool
) -> None:
    """A handle opens its next connection with the password that the file holds by then."""
    config = rotated.config(max_size=1)
    if as_dsn:
        config["connection_settings"] = {"dsn": {"from_file": str(rotated.file)}}
        rotated.write(make_conninfo(**rotated.settings, password=rotated.password))
    handle = await call(ask(manager, config, type_))
    async with block(handle) as conn:
        before = await pid(conn)
    rotated.rotate("second 'one'")
    if as_dsn:
        rotated.write(make_conninfo(**rotated.settings, password=rotated.password))
    assert handle is await call(ask(manager, config, type_))
    if handle.pool is not None:
        await call(handle.pool.drain())
    async with block(handle) as conn:
        assert await pid(conn) != before
    assert await call(ask(manager, config, type_, force_reload=True)) is not handle


@pytest.mark.asyncio
@pytest.mark.parametrize("type_", ["normal", "async"])
async def test_a_file_that_is_gone(
    manager: PGConnectionManager, rotated: Rotated, type_: str
) -> None:
    """Where the file cannot be read any more, the next connection says so."""
    handle = await call(ask(manager, rotated.config(), type_))
    rotated.file.unlink()
    with pytest.raises(EnvInterpolationError, match=r"settings\.password: cannot read secret file"):
        async with block(handle):
            pass


def test_under_load(rotated: Rotated) -> None:
    """Threads that never pause go on with a new password when the sessions of the old one end."""
    with PGConnectionManager() as manager:
        rotate_under_load(ask(manager, rotated.config(min_size=2), "pool"), rotated)


def rotate_under_load(handle: Any, rotated: Rotated) -> None:
    stop, seen = threading.Event(), [set[int]() for _ in range(4)]

    def work(pids: set[int]) -> None:
        while not stop.is_set():
            # Who is in a block when its session is ended loses that one.
            with suppress(psycopg.OperationalError), handle as conn:
                pids.add(conn.execute("SELECT pg_backend_pid()").fetchone()[0])

    with ThreadPoolExecutor(4) as threads:
        try:
            working = [threads.submit(work, pids) for pids in seen]
            for password in ("second", "third"):
                until(lambda: all(seen))
                rotated.rotate(password)
                old = rotated.end_sessions()
                assert old
                until(lambda gone=old: all(pids - gone for pids in map(set.copy, seen)))  # type: ignore[misc]
                for pids in seen:
                    pids.clear()
        finally:
            stop.set()
        for each in working:
            each.result()


@pytest.mark.asyncio
@pytest.mark.parametrize("type_", POOLS)
@pytest.mark.parametrize("name", ["conninfo", "kwargs"])
async def test_functions_of_a_pool(
    manager: PGConnectionManager, rotated: Rotated, type_: str, name: str
) -> None:
    """What a function gives for a new connection wins over the configuration."""
    calls = []

    def kwargs() -> dict[str, Any]:
        calls.append(rotated.password)
        return {"password": rotated.password, "application_name": "by a function"}

    async def akwargs() -> dict[str, Any]:
        return kwargs()

    def conninfo() -> str:
        return make_conninfo(**kwargs())

    async def aconninfo() -> str:
        return make_conninfo(**kwargs())

    sync = {"conninfo": conninfo, "kwargs": kwargs}[name]
    given: Any = {"conninfo": aconninfo, "kwargs": akwargs}[name] if "async" in type_ else sync
    config = rotated.config(max_size=1, **{name: given})
    config["connection_settings"]["password"] = "stale"
    config["async_settings"] = config["sync_settings"] = {"work_mem": "5MB"}
    handle = await call(ask(manager, config, type_))
    for password in ("second", "third"):
        async with block(handle) as conn:
            assert await value(conn, "SHOW application_name") == "by a function"
            assert await value(conn, "SHOW work_mem") == "5MB"
        rotated.rotate(password)
        await call(handle.pool.drain())
    async with block(handle):
        pass
    assert list(dict.fromkeys(calls)) == ["first", "second", "third"]


@pytest.mark.asyncio
@pytest.mark.parametrize("type_", POOLS)
async def test_a_function_that_gives_no_dsn(
    manager: PGConnectionManager, rotated: Rotated, type_: str
) -> None:
    """What cannot be read is an error at once, which does not show it."""
    config = rotated.config(conninfo=lambda: "password=an hunter2")
    with pytest.raises(ValueError, match=r"pool_settings\.conninfo: cannot be read") as caught:
        await call(ask(manager, config, type_))
    assert "hunter2" not in repr(caught.value)


def test_a_clone_is_not_led_elsewhere(tmp_path: Path) -> None:
    """In a test no file and no function leads a connection to production."""
    (tmp_path / "password").write_text("secret")
    pool = {
        "conninfo": lambda: "host=production",
        "kwargs": {"host": "production", "prepare_threshold": None},
    }
    config = {
        "connection_settings": {"password": {"from_file": str(tmp_path / "password")}},
        "pool_settings": pool,
    }
    spec = in_clone(resolved_spec(config, "pool", resolve_env=True), {"host": "clone"})
    assert spec.read_conninfo() == {"host": "clone"}
    assert dict(spec.pool)["kwargs"] == {"prepare_threshold": None}
    assert "conninfo" not in dict(spec.pool)
    config["pool_settings"] = {"kwargs": lambda: {"host": "production"}}
    assert "kwargs" not in dict(in_clone(resolved_spec(config, "pool", True), {}).pool)
