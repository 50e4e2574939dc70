"""The four connection types. `pgmonkey --help` imports this module: keep its imports few."""

from __future__ import annotations

from enum import Enum


class ConnectionType(str, Enum):
    """The four ways to connect."""

    NORMAL = "normal"
    POOL = "pool"
    ASYNC = "async"
    ASYNC_POOL = "async_pool"

    def __str__(self) -> str:
        return self.value

    @property
    def is_async(self) -> bool:
        return self in (ConnectionType.ASYNC, ConnectionType.ASYNC_POOL)

    @property
    def is_pool(self) -> bool:
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
