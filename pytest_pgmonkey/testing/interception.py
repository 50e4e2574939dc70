"""Leads the application's handles to the running test instead of their own servers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ..errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ..config import ConnectionSpec
    from ..manager import PGConnectionManager
    from ..sources import HandleLike
    from .isolation import Sources

__all__ = ["Interception"]


class Interception:
    """The interceptor of `pytest_pgmonkey.sources` for one test session.

    With `everything` false only the kit's own managers are intercepted, and the application's
    handles are left alone. `kit_is_used` is asked when a handle is entered before the tests are
    collected.
    """

    def __init__(
        self, mapped: Mapping[str, str], kit_is_used: Callable[[], bool], *, everything: bool
    ) -> None:
        self._everything = everything
        self._mapped = set(mapped)
        self._kit_is_used = kit_is_used
        self._collected = False
        self._own: WeakSet[object] = WeakSet()
        self._leading: Any = None  # what handles borrow from now
        self._primary: str | None = None
        self._primary_origin = ""

    # What handles lead to

    def collected(self) -> None:
        """Note that the tests are known: from now on handles are refused while no test runs."""
        self._collected = True

    @contextmanager
    def preparing(self, sources: Sources) -> Iterator[None]:
        """Lead handles to the database being prepared, for a block."""
        before, self._leading = self._leading, sources
        try:
            yield
        finally:
            self._leading = before

    def begin_test(self, isolation: Sources) -> None:
        """Lead handles to a test's isolation from now on."""
        self._leading = isolation

    def end_test(self) -> None:
        """Refuse handles until the next test."""
        self._leading = None

    @property
    def leading(self) -> Sources | None:
        """What handles borrow from now; `None` while no test runs."""
        found: Sources | None = self._leading
        return found

    # Which handles

    def adopt(self, manager: PGConnectionManager) -> None:
        """Treat a manager as the kit's own: its handles always lead to the test."""
        self._own.add(manager)

    def accept(self, dbname: str) -> None:
        """Let a database name from the kit lead to the test's database, too."""
        self._mapped.add(dbname)

    def judge(self, spec: ConnectionSpec, owner: object) -> bool:
        """Accept or refuse a configuration; return whether its handle is intercepted."""
        if owner in self._own:
            return True
        if self._everything:
            self._judge_database(spec)
        return self._everything

    def _judge_database(self, spec: ConnectionSpec) -> None:
        name = spec.dbname
        if name is None or name in self._mapped:
            return
        origin = spec.origin or "a dictionary or DSN"
        if self._primary is None:
            self._primary, self._primary_origin = name, origin
        elif name != self._primary:
            from ..secrets import redact_text  # not while the plugin loads

            # Somebody may have written a whole connection string in the place of a name.
            name, primary = redact_text(name), redact_text(self._primary)
            raise SandboxError(
                f"{origin} names the database {name!r}, and {self._primary_origin} names "
                f"{primary!r}: there is one test database. To let both lead to it, add to "
                f"the ini file:\npgmonkey_map =\n    {name} = primary"
            )

    # Every borrower passes these two.

    def source(self, handle: HandleLike) -> Any:
        """Give what to borrow from now, `None` for the handle's own; raises SandboxError."""
        leading = self._leading
        if leading is not None and self._everything:
            return leading.source(handle)
        return self._other_source(handle, "source")

    def async_source(self, handle: HandleLike) -> Any:
        """Give what to borrow from now, `None` for the handle's own; raises SandboxError."""
        leading = self._leading
        if leading is not None and self._everything:
            return leading.async_source(handle)
        return self._other_source(handle, "async_source")

    def _other_source(self, handle: HandleLike, method: str) -> Any:
        if not self._everything and handle._owner not in self._own:
            return None
        leading = self._leading  # once: the test may end in another thread
        if leading is not None:
            return getattr(leading, method)(handle)
        if not self._collected and not self._kit_is_used():
            return None
        raise SandboxError(
            f"{handle!r} is used outside of a test that has a database. Let the test ask for one: "
            "with a fixture (pgmonkey, pgmonkey_connection, pgmonkey_pool, …) or with "
            "@pytest.mark.pgmonkey; a session fixture can write to the prepared database inside "
            "`with pgmonkey_database.unblock():`."
        )
