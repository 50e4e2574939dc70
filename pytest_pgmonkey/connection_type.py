"""The four connection types. `pgmonkey --help` imports this module: keep its imports few."""

from __future__ import annotations

from enum import Enum


class ConnectionType(str, Enum):
    """The four ways to connect. Each equals its name as a string, which you may use instead."""

    #: A connection of its own for each block.
    NORMAL = "normal"
    #: A connection from a psycopg_pool pool for each block.
    POOL = "pool"
    #: As `NORMAL`, for coroutines.
    ASYNC = "async"
    #: As `POOL`, for coroutines.
    ASYNC_POOL = "async_pool"

    def __str__(self) -> str:
        return self.value

    @property
    def is_async(self) -> bool:
        """Whether its handles are for coroutines."""
        return self in (ConnectionType.ASYNC, ConnectionType.ASYNC_POOL)

    @property
    def is_pool(self) -> bool:
        """Whether its handles lend connections from a pool."""
        return self in (ConnectionType.POOL, ConnectionType.ASYNC_POOL)

    @property
    def settings_section(self) -> str:
        return "async_settings" if self.is_async else "sync_settings"

    @property
    def pool_section(self) -> str | None:
        if not self.is_pool:
            return None
        return "async_pool_settings" if self.is_async else "pool_settings"


# Plain strings, for what would print the members otherwise.
CONNECTION_TYPES = tuple(type_.value for type_ in ConnectionType)
