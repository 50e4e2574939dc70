"""What stands between the application's handles and their servers while a test session runs."""

from __future__ import annotations

from contextlib import contextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from ..errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ..config import ConnectionSpec
    from ..handles import AsyncHandle, Handle
    from ..manager import PGConnectionManager
    from .isolation import Sources

__all__ = ["Interception"]


class _Phase(Enum):
    """What a handle that is entered now leads to."""

    UNDECIDED = auto()  # tests are being collected: does any of them use the kit?
    OUTSIDE = auto()  # nowhere: no test of the kit runs
    PREPARING = auto()  # the database that is being prepared
    TEST = auto()  # the test's transaction


class Interception:
    """The interceptor of `pytest_pgmonkey.sources` for one test session.

    With `everything` false only the kit's own managers are intercepted, and the application's
    handles are left alone. `kit_is_used` is asked when a handle is entered before the tests are
    collected.
    """

    def __init__(
        self, mapped: Mapping[str, str], kit_is_used: Callable[[], bool], *, everything: bool
    ) -> None:
        self.everything: Final = everything
        self._mapped = mapped
        self._kit_is_used = kit_is_used
        self._phase = _Phase.UNDECIDED
        self._own: WeakSet[PGConnectionManager] = WeakSet()
        self._test: Any = None  # an Isolation
        self._preparing: Sources | None = None
        self._primary: str | None = None
        self._primary_origin = ""

    # What handles lead to

    def collected(self) -> None:
        """Refuse handles from now on where no test runs: the tests are known."""
        self._phase = _Phase.OUTSIDE

    @contextmanager
    def preparing(self, sources: Sources) -> Iterator[None]:
        """Lead handles to the database being prepared, for a block."""
        before = self._phase, self._preparing
        self._phase, self._preparing = _Phase.PREPARING, sources
        try:
            yield
        finally:
            self._phase, self._preparing = before

    def begin_test(self, isolation: Sources) -> None:
        """Lead handles to a test's isolation from now on."""
        self._test = isolation
        self._phase = _Phase.TEST

    def end_test(self) -> None:
        """Refuse handles until the next test."""
        self._phase = _Phase.OUTSIDE

    # Which handles

    def adopt(self, manager: PGConnectionManager) -> None:
        """Take a manager for the kit's own, whose handles are led to the test in any case."""
        self._own.add(manager)

    def intercepts(self, owner: Any) -> bool:
        """Whether the handles of this manager are led to the test's database."""
        return self.everything or (owner is not None and owner in self._own)

    def judge(self, spec: ConnectionSpec, owner: Any = None) -> bool:
        """Accept or refuse a configuration; gives whether its handle is intercepted."""
        if not self.intercepts(owner):
            return False
        if owner is None or owner not in self._own:
            self._judge_database(spec)
        return True

    def _judge_database(self, spec: ConnectionSpec) -> None:
        name = spec.dbname
        if name is None or name in self._mapped:
            return
        origin = spec.origin or "a dictionary"
        if self._primary is None:
            self._primary, self._primary_origin = name, origin
        elif name != self._primary:
            raise SandboxError(
                f"{origin} names the database {name!r}, and {self._primary_origin} names "
                f"{self._primary!r}: there is one test database. To let both lead to it, add to "
                f"the ini file:\npgmonkey_map =\n    {name} = primary"
            )

    # The interceptor's two questions

    def source(self, handle: Handle) -> Any:
        """Give what to borrow from now, `None` for the handle's own; raises SandboxError."""
        if self._phase is _Phase.TEST and self.everything:
            return self._test.source(handle)
        return self._other_source(handle, "source")

    def async_source(self, handle: AsyncHandle) -> Any:
        """Give what to borrow from now, `None` for the handle's own; raises SandboxError."""
        if self._phase is _Phase.TEST and self.everything:
            return self._test.async_source(handle)
        return self._other_source(handle, "async_source")

    def _other_source(self, handle: Handle | AsyncHandle, method: str) -> Any:
        manager = handle._manager() if handle._manager is not None else None
        if not self.intercepts(manager):
            return None
        if self._phase is _Phase.TEST:
            return getattr(self._test, method)(handle)
        if self._phase is _Phase.PREPARING:
            return getattr(self._preparing, method)(handle)
        if self._phase is _Phase.UNDECIDED and not self._kit_is_used():
            return None
        raise SandboxError(
            f"{handle!r} is used outside of a test that has a database. Let the test ask for one: "
            "with a fixture (pgmonkey, pgmonkey_connection, pgmonkey_pool, …) or with "
            "@pytest.mark.pgmonkey; a session fixture can write to the prepared database inside "
            "`with pgmonkey_database.unblock():`."
        )
