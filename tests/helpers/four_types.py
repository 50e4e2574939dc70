"""One way to write a test for the four connection types: what can be awaited is."""

from __future__ import annotations

from contextlib import asynccontextmanager
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from pytest_pgmonkey import ConnectionType, PGConnectionManager

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

ALL = [str(type_) for type_ in ConnectionType]
SYNC = ["normal", "pool"]
ASYNC = ["async", "async_pool"]
POOLS = ["pool", "async_pool"]

#: A directory in which no server listens; a temporary one may be too long for a socket.
NOWHERE = "/nonexistent"


async def call(result: Any) -> Any:
    """Give a result, awaited where its type is an async one."""
    return await result if isawaitable(result) else result


@asynccontextmanager
async def block(context: Any) -> AsyncIterator[Any]:
    """Enter a handle, or what one of its methods gives, with `with` or `async with`."""
    if hasattr(context, "__aenter__"):
        async with context as conn:
            yield conn
    else:
        with context as conn:
            yield conn


async def execute(conn: Any, query: str, params: Any = None) -> Any:
    return await call(conn.execute(query, params))


async def value(conn: Any, query: str, params: Any = None) -> Any:
    """Give the first column of the first row."""
    row = await call((await execute(conn, query, params)).fetchone())
    return row[0]


async def pid(conn: Any) -> int:
    return int(await value(conn, "SELECT pg_backend_pid()"))


class Kind:
    """One connection type on one database, with the sections named for it."""

    def __init__(self, name: str, config: Mapping[str, Any], manager: PGConnectionManager) -> None:
        self.type = ConnectionType(name)
        self.config = config
        self.manager = manager

    def sections(
        self,
        settings: Mapping[str, Any] | None = None,
        pool: Mapping[str, Any] | None = None,
        **connection: Any,
    ) -> dict[str, Any]:
        config = dict(self.config)
        config["connection_settings"] = {**config["connection_settings"], **connection}
        if settings is not None:
            config[self.type.settings_section] = settings
        if self.type.pool_section:
            config[self.type.pool_section] = {"min_size": 1, "max_size": 4, **(pool or {})}
        return config

    async def get(self, manager: Any = None, force_reload: bool = False, **sections: Any) -> Any:
        manager = manager or self.manager
        return await call(
            manager.get_database_connection_from_dict(
                self.sections(**sections), self.type, force_reload=force_reload
            )
        )
