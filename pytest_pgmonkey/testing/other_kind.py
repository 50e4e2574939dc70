"""Handles of the other kind: async types in a sync test body, sync types in an async one.

A `BlockingHandle` runs an async handle's coroutines to their end, an `AwaitableHandle` gives a
sync handle's results to `await`. Both are thin: they pass on the methods listed here, and say so
of every other.
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator
    from types import TracebackType

    from ..handles import AsyncHandle, Handle

__all__ = ["AwaitableHandle", "BlockingHandle", "view"]

_METHODS: Final = frozenset(
    (
        # A handle's
        "connection cursor disconnect test_connection transaction "
        # A connection's
        "cancel_safe close commit cursor execute pipeline rollback set_autocommit set_deferrable "
        "set_isolation_level set_read_only transaction "
        # A cursor's
        "close copy execute executemany fetchall fetchmany fetchone nextset results scroll stream "
        # A copy's
        "read read_row rows set_types write write_row"
    ).split()
)
_ATTRIBUTES: Final = frozenset(
    (
        "adapters arraysize autocommit broken closed config connection_type deferrable description "
        "format info isolation_level itersize name pgresult pool prepare_threshold prepared_max "
        "read_only row_factory rowcount rownumber savepoint_name scrollable spec statusmessage "
        "withhold"
    ).split()
)


@contextmanager
def view(handle: Handle | AsyncHandle, *, for_async: bool) -> Iterator[Any]:
    """Give a handle in the form that a sync or an async test body can use, for a block."""
    if handle.connection_type.is_async == for_async:
        yield handle
    elif for_async:
        yield AwaitableHandle(handle)
    else:
        runner = asyncio.SelectorEventLoop()  # psycopg needs a selector, on Windows too
        try:
            yield BlockingHandle(handle, runner)
        finally:
            runner.run_until_complete(runner.shutdown_asyncgens())
            runner.close()


class _View:
    """What both directions share: which names are passed on, and how the others are refused."""

    __slots__ = ("_viewed",)

    def __init__(self, viewed: Any) -> None:
        object.__setattr__(self, "_viewed", viewed)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._viewed!r}>"

    def __getattr__(self, name: str) -> Any:
        viewed = self._viewed
        if name in _ATTRIBUTES:
            return getattr(viewed, name)
        if name in _METHODS and hasattr(viewed, name):
            return self._passed_on(getattr(viewed, name))
        raise AttributeError(
            f"{name!r} is not passed on by {type(self).__name__}, the view of "
            f"{type(viewed).__name__} for a test of the other kind; give the test the types of "
            "its own kind, with @pytest.mark.pgmonkey(types='native')"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ATTRIBUTES:
            raise AttributeError(f"{name!r} cannot be set through {type(self).__name__}")
        setattr(self._viewed, name, value)

    def _passed_on(self, method: Callable[..., Any]) -> Callable[..., Any]:
        raise NotImplementedError


def _is_plain(value: Any) -> bool:
    """Whether a result is data, not one more object of the other kind."""
    return not any(
        hasattr(value, name)
        for name in ("__aenter__", "__enter__", "__anext__", "__await__", "fetchone")
    ) and not inspect.isgenerator(value)


class BlockingHandle(_View):
    """An async handle, or what came from it, for sync code: `with`, calls and `for`."""

    __slots__ = ("_runner",)

    def __init__(self, viewed: AsyncHandle | Any, runner: asyncio.AbstractEventLoop) -> None:
        super().__init__(viewed)
        object.__setattr__(self, "_runner", runner)

    def _run(self, awaitable: Any) -> Any:
        async def main() -> Any:
            return await awaitable

        return self._runner.run_until_complete(main())

    def _wrap(self, value: Any) -> Any:
        if inspect.isawaitable(value):
            value = self._run(value)
        if value is self._viewed:
            return self
        return value if _is_plain(value) else BlockingHandle(value, self._runner)

    def _passed_on(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._wrap(method(*args, **kwargs))

    def __enter__(self) -> Any:
        return self._wrap(self._viewed.__aenter__())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return bool(self._run(self._viewed.__aexit__(exc_type, exc, traceback)))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._viewed.__aiter__()
        end = object()
        while (item := self._run(anext(iterator, end))) is not end:
            yield self._wrap(item)


class AwaitableHandle(_View):
    """A sync handle, or what came from it, for async code: `async with`, `await`, `async for`."""

    __slots__ = ()

    def __init__(self, viewed: Handle | Any) -> None:
        super().__init__(viewed)

    def _wrap(self, value: Any) -> Any:
        if value is self._viewed:
            return self
        return value if _is_plain(value) else AwaitableHandle(value)

    def _passed_on(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: _Result(self._wrap, method, args, kwargs)

    async def __aenter__(self) -> Any:
        return self._wrap(self._viewed.__enter__())

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return bool(self._viewed.__exit__(exc_type, exc, traceback))

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self._viewed:
            yield self._wrap(item)


class _Result:
    """A call that is made when it is awaited, entered or iterated, as its async twin would be.

    Psycopg's async methods are of three kinds: coroutines (`execute`), plain functions whose
    result is entered (`transaction`, `copy`, `cursor`), and async generators (`stream`).
    """

    __slots__ = ("_args", "_entered", "_kwargs", "_method", "_value", "_wrap")

    def __init__(
        self, wrap: Callable[[Any], Any], method: Any, args: Any, kwargs: dict[str, Any]
    ) -> None:
        self._wrap, self._method, self._args, self._kwargs = wrap, method, args, kwargs
        self._value: Any = None

    def _call(self) -> Any:
        if self._value is None:
            self._value = self._wrap(self._method(*self._args, **self._kwargs))
        return self._value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        return self._call()

    async def __aenter__(self) -> Any:
        self._entered = self._call()
        return await self._entered.__aenter__()

    async def __aexit__(self, *exc: Any) -> bool | None:
        outcome: bool | None = await self._entered.__aexit__(*exc)
        return outcome

    def __aiter__(self) -> AsyncIterator[Any]:
        iterator: AsyncIterator[Any] = self._call().__aiter__()
        return iterator

    def __getattr__(self, name: str) -> Any:
        # `cursor()` is no coroutine: its result is used at once.
        return getattr(self._call(), name)
