"""The sandbox: the outer transaction with its door for code on psycopg."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

from .core.outer import OuterTransaction
from .core.places import caller
from .psycopg_door.connections import AsyncSandboxConnection, SandboxConnection
from .psycopg_door.internals import Template, check_psycopg
from .psycopg_door.lending import (
    AsyncSandboxPool,
    AsyncSandboxSource,
    SandboxPool,
    SandboxSource,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...handles import AsyncHandle, Handle
    from .core.backend import Backend
    from .core.outer import Scope

_NAMES_PER_CONNECTION: Final = 1_000_000
_CLASSES: Final = (SandboxConnection, AsyncSandboxConnection)


class Sandbox(OuterTransaction):
    """Lends psycopg connections that lead into the test's transaction."""

    def __init__(self, conninfo: Mapping[str, str], wait_timeout: float = 5.0) -> None:
        check_psycopg()
        super().__init__(conninfo, wait_timeout)
        self._template: tuple[Backend, Template] | None = None
        self._sources: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._used: list[SandboxSource | AsyncSandboxSource] = []
        self._lent = 0

    def source(self, handle: Handle) -> SandboxSource:
        """Give what a sync handle borrows from in the current test."""
        source: SandboxSource = self._source(handle, SandboxSource, SandboxPool)
        return source

    def async_source(self, handle: AsyncHandle) -> AsyncSandboxSource:
        """Give what an async handle borrows from in the current test."""
        source: AsyncSandboxSource = self._source(handle, AsyncSandboxSource, AsyncSandboxPool)
        return source

    def _source(self, handle: Any, direct: type[Any], pool: type[Any]) -> Any:
        source = self._sources.get(handle)
        if source is None:
            kind = pool if handle.spec.type.is_pool else direct
            source = self._sources[handle] = kind(self.lend, handle)
        if not source.is_used:
            source.is_used = True
            self._used.append(source)
        return source

    def lend(
        self,
        cls: type[Any],
        settings: tuple[tuple[str, str], ...] = (),
        *,
        autocommit: bool = False,
        pool: object | None = None,
    ) -> Any:
        """Give a new connection that leads into the test."""
        if self._scopes and not self._in_test:
            self.begin()
        return self._lend(cls, settings, autocommit=autocommit, pool=pool)

    def _lend(
        self,
        cls: type[Any],
        settings: tuple[tuple[str, str], ...] = (),
        *,
        autocommit: bool = False,
        pool: object | None = None,
    ) -> Any:
        member = self.join(caller(), settings)
        backend = member.backend
        if self._template is None or self._template[0] is not backend:
            self._template = backend, Template(backend.pgconn, _CLASSES)
        self._lent += 1
        conn = self._template[1].make(
            cls,
            autocommit=autocommit,
            pool=pool,
            prepared_index=self._lent * _NAMES_PER_CONNECTION,
        )
        conn._member = member
        member.serve(weakref.ref(conn))
        return conn

    def open_scope(self) -> Scope[SandboxConnection]:
        """Begin data that several tests share; `scope.close()` takes it back."""
        self.make_room()
        conn: SandboxConnection = self._lend(SandboxConnection)
        return self.add_scope(conn._member, conn)

    def reset(self) -> list[str]:
        """Undo what a test did and give what went wrong in it, as sentences for its report."""
        self.forget_sources()
        return super().reset()

    def forget_sources(self) -> None:
        """Have handles ask for what they borrow from anew."""
        for source in self._used:
            source.renew()
        self._used.clear()

    def close(self) -> None:
        """End the session with the server."""
        self._template = None
        super().close()
