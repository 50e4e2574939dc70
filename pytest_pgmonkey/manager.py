"""`PGConnectionManager` makes one handle for each configuration, caches it and closes it."""

from __future__ import annotations

import asyncio
import threading
from asyncio import AbstractEventLoop
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast, overload
from weakref import ref

from . import sources
from .config import dsn_spec, read_spec, resolved_spec
from .connecting import adrive, drive, forget_in_child
from .connection_type import ConnectionType
from .errors import ConfigError
from .handles import AsyncHandle, Handle, PendingHandle, make_handle

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from psycopg import AsyncConnection, Connection
    from typing_extensions import Self

    from .config import ConnectionSpec
    from .connecting import Steps
    from .handles import AsyncPoolHandle, PoolHandle

AnyHandle: TypeAlias = "Handle | AsyncHandle"
Normal: TypeAlias = Literal["normal", ConnectionType.NORMAL]
Pool: TypeAlias = Literal["pool", ConnectionType.POOL]
Async: TypeAlias = Literal["async", ConnectionType.ASYNC]
AsyncPool: TypeAlias = Literal["async_pool", ConnectionType.ASYNC_POOL]
LoopRef: TypeAlias = "ref[AbstractEventLoop] | None"
Key: TypeAlias = "tuple[ConnectionSpec, LoopRef]"
Origin: TypeAlias = "tuple[str, ConnectionType, LoopRef]"


class CacheInfo(TypedDict):
    """The cached handles of a manager."""

    size: int
    connection_types: dict[str, str]
    """The type of each handle; the keys are hashes, which reveal no settings."""


class PGConnectionManager:
    """Makes and caches handles: you get the same handle until its configuration changes.

    `configure` (for the sync types) and `aconfigure` (for the async types, a function or a
    coroutine function) are called with every new connection. Threads and tasks may share a
    manager. `with` and `async with` close it at their end.
    """

    def __init__(
        self,
        configure: Callable[[Connection[Any]], None] | None = None,
        aconfigure: Callable[[AsyncConnection[Any]], Any] | None = None,
    ) -> None:
        self._configure = configure
        self._aconfigure = aconfigure
        self._lock = threading.Lock()
        self._cache: dict[Key, AnyHandle] = {}
        # A reload follows its file, whose content may have changed since.
        self._latest: dict[Origin, Key] = {}
        forget_in_child(self)

    # --- handles ---

    @overload
    def get_database_connection(
        self,
        config_file_path: str | os.PathLike[str],
        connection_type: Normal,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> Handle: ...
    @overload
    def get_database_connection(
        self,
        config_file_path: str | os.PathLike[str],
        connection_type: Pool,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> PoolHandle: ...
    @overload
    def get_database_connection(
        self,
        config_file_path: str | os.PathLike[str],
        connection_type: Async,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> PendingHandle[AsyncHandle]: ...
    @overload
    def get_database_connection(
        self,
        config_file_path: str | os.PathLike[str],
        connection_type: AsyncPool,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> PendingHandle[AsyncPoolHandle]: ...
    @overload
    def get_database_connection(
        self,
        config_file_path: str | os.PathLike[str],
        connection_type: str | ConnectionType | None = None,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> Handle | PendingHandle[AsyncHandle]: ...
    def get_database_connection(
        self,
        config_file_path: str | os.PathLike[str],
        connection_type: str | ConnectionType | None = None,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> Handle | PendingHandle[AsyncHandle]:
        """Get the handle of a YAML file.

        Without `connection_type` it has the type that the file names, or else `normal`. The sync
        types give a `Handle`. For the async types, `await` what you get for an `AsyncHandle`, or
        use it in `async with` for a connection.

        `force_reload` reads the file again and opens a new handle. Open blocks finish on the old
        one.
        `resolve_env` replaces `${VAR}`, `from_env` and `from_file` in the file. With it,
        `allow_sensitive_defaults` lets `${VAR:-default}` stand for passwords, too, and `strict`
        refuses variables that are set but empty.

        Raises `ConfigError` for a bad file. A new handle connects first to prove that its server
        answers; where that fails, psycopg's own error is raised.
        """
        options = (resolve_env, allow_sensitive_defaults, strict)
        return self._get(read_spec(config_file_path, connection_type, *options), force_reload)

    @overload
    def get_database_connection_from_dict(
        self,
        config: Mapping[str, Any],
        connection_type: Normal,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> Handle: ...
    @overload
    def get_database_connection_from_dict(
        self,
        config: Mapping[str, Any],
        connection_type: Pool,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> PoolHandle: ...
    @overload
    def get_database_connection_from_dict(
        self,
        config: Mapping[str, Any],
        connection_type: Async,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> PendingHandle[AsyncHandle]: ...
    @overload
    def get_database_connection_from_dict(
        self,
        config: Mapping[str, Any],
        connection_type: AsyncPool,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> PendingHandle[AsyncPoolHandle]: ...
    @overload
    def get_database_connection_from_dict(
        self,
        config: Mapping[str, Any],
        connection_type: str | ConnectionType | None = None,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> Handle | PendingHandle[AsyncHandle]: ...
    def get_database_connection_from_dict(
        self,
        config: Mapping[str, Any],
        connection_type: str | ConnectionType | None = None,
        force_reload: bool = False,
        resolve_env: bool = False,
        allow_sensitive_defaults: bool = False,
        strict: bool = False,
    ) -> Handle | PendingHandle[AsyncHandle]:
        """Get the handle of a dictionary that has the sections of a file.

        All else is as with `get_database_connection`.
        """
        options = (resolve_env, allow_sensitive_defaults, strict)
        return self._get(resolved_spec(config, connection_type, *options), force_reload)

    @overload
    def get_database_connection_from_dsn(
        self, dsn: str, connection_type: Normal = "normal", force_reload: bool = False
    ) -> Handle: ...
    @overload
    def get_database_connection_from_dsn(
        self, dsn: str, connection_type: Pool, force_reload: bool = False
    ) -> PoolHandle: ...
    @overload
    def get_database_connection_from_dsn(
        self, dsn: str, connection_type: Async, force_reload: bool = False
    ) -> PendingHandle[AsyncHandle]: ...
    @overload
    def get_database_connection_from_dsn(
        self, dsn: str, connection_type: AsyncPool, force_reload: bool = False
    ) -> PendingHandle[AsyncPoolHandle]: ...
    @overload
    def get_database_connection_from_dsn(
        self,
        dsn: str,
        connection_type: str | ConnectionType | None = None,
        force_reload: bool = False,
    ) -> Handle | PendingHandle[AsyncHandle]: ...
    def get_database_connection_from_dsn(
        self,
        dsn: str,
        connection_type: str | ConnectionType | None = None,
        force_reload: bool = False,
    ) -> Handle | PendingHandle[AsyncHandle]:
        """Get the handle of a DSN, as `get_database_connection` does for a file.

        The DSN is a URL (`postgresql://user@host/dbname`) or a string of libpq's keywords
        (`host=… dbname=…`). Without `connection_type` the handle is `normal`. For session settings
        or the size of a pool, give the DSN as a key of `connection_settings`, in a file or a
        dictionary.

        Raises `ConfigError` where libpq cannot read the DSN, or where it is empty: an unset
        variable must not lead to whatever database the environment knows.
        """
        if not isinstance(dsn, str) or not dsn.strip():
            raise ConfigError("the DSN is empty or not a string", hint="is its variable set?")
        return self._get(dsn_spec(dsn, connection_type), force_reload)

    def _get(self, spec: ConnectionSpec, reload: bool) -> Handle | PendingHandle[AsyncHandle]:
        if spec.type.is_async:
            self._is_intercepted(spec)  # What is refused is refused here, too.
            return PendingHandle(partial(self._aget, spec), reload)
        return cast("Handle", drive(self._obtain(spec, None, reload)))

    async def _aget(self, spec: ConnectionSpec, reload: bool) -> AsyncHandle:
        loop = ref(asyncio.get_running_loop())
        return cast("AsyncHandle", await adrive(self._obtain(spec, loop, reload)))

    def _is_intercepted(self, spec: ConnectionSpec) -> bool:
        return sources.interceptor is not None and sources.interceptor.judge(spec, self)

    def _obtain(self, spec: ConnectionSpec, loop: LoopRef, reload: bool) -> Steps[AnyHandle]:
        # Now, as a test session may have begun since an async handle was asked for.
        intercepted = self._is_intercepted(spec)
        key = (spec, loop)
        handle = self._find_or_make(key, reload)
        if not intercepted:
            try:
                yield from handle._open()
            except BaseException:
                self._evict(handle)
                raise
        for old in self._replace(key, handle, reload):
            yield from old._supersede(handle)
        return handle

    def _find_or_make(self, key: Key, reload: bool) -> AnyHandle:
        """Find or make the handle of a key; caching it at once makes other threads wait for it."""
        with self._lock:
            cached = self._cache.get(key)
            if cached is not None and not reload and not cached._gone:
                return cached
            # Not before: nobody finds the handle of an ended loop, and a new loop makes a handle.
            self._drop_ended_loops()
            hook = self._aconfigure if key[0].type.is_async else self._configure
            handle = make_handle(key[0], hook, self)
            if not reload:
                self._cache[key] = handle
            return handle

    def _replace(self, key: Key, handle: AnyHandle, reload: bool) -> list[AnyHandle]:
        """Cache an opened handle; returns the handles that it replaces."""
        spec, loop = key
        replaced: list[AnyHandle] = []
        with self._lock:
            before = key
            if spec.origin is not None:
                origin = (spec.origin, spec.type, loop)
                before = self._latest.get(origin, key)
                self._latest[origin] = key
            if reload:
                old = [self._cache.pop(each, None) for each in dict.fromkeys((key, before))]
                replaced = [each for each in old if each is not None and each is not handle]
                self._cache[key] = handle
        return replaced

    def _drop_ended_loops(self) -> None:
        for key in [key for key in self._cache if _has_ended(key[1])]:
            del self._cache[key]
        for origin in [origin for origin in self._latest if _has_ended(origin[2])]:
            del self._latest[origin]

    def _evict(self, handle: AnyHandle) -> None:
        """Remove a handle from the cache."""
        with self._lock:
            for key in [key for key, cached in self._cache.items() if cached is handle]:
                del self._cache[key]

    # --- the cache ---

    @property
    def cache_info(self) -> CacheInfo:
        """How many handles the manager holds (`size`), and of which types (`connection_types`)."""
        with self._lock:
            self._drop_ended_loops()
            types = {f"{hash(key) % 16**12:012x}": str(key[0].type) for key in self._cache}
        return {"size": len(types), "connection_types": types}

    def clear_cache(self) -> None:
        """Disconnect all handles; each event loop closes its async handles when it next runs."""
        for handle in self._take_all():
            if isinstance(handle, AsyncHandle):
                handle._close_soon()
            else:
                handle.disconnect()

    async def clear_cache_async(self) -> None:
        """Disconnect all handles, and wait for the async ones of the running loop."""
        for handle in self._take_all():
            if isinstance(handle, AsyncHandle):
                await handle.disconnect()
            else:
                handle.disconnect()

    def _take_all(self) -> list[AnyHandle]:
        with self._lock:
            handles = list(self._cache.values())
            self._cache.clear()
            self._latest.clear()
        return handles

    def close(self) -> None:
        """Close what the manager has opened. You can use the manager again afterwards."""
        self.clear_cache()

    async def aclose(self) -> None:
        """Close what the manager has opened, and wait for the async handles of the running loop.

        You can use the manager again afterwards.
        """
        await self.clear_cache_async()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self._cache)} handles>"

    def forget_parent(self) -> None:
        # The thread that held it does not exist in a forked child.
        self._lock = threading.Lock()


def _has_ended(loop: LoopRef) -> bool:
    return loop is not None and ((alive := loop()) is None or alive.is_closed())
