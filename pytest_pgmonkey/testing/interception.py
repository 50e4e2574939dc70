"""What stands between the application's handles and their servers while a test session runs."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ..errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..config import ConnectionSpec
    from ..sources import HandleLike

__all__ = ["Interception", "Phase"]


class Phase(Enum):
    """What a handle that is entered now leads to."""

    UNDECIDED = auto()  # tests are being collected: does any of them use the kit?
    OUTSIDE = auto()  # nowhere: no test of the kit runs
    PREPARING = auto()  # the database that is being prepared
    TEST = auto()  # the test's transaction


class Interception:
    """The interceptor of `pytest_pgmonkey.sources` for one test session.

    With `everything` false only the kit's own managers are intercepted (`own`), and the
    application's handles are left alone.
    """

    def __init__(self, mapped: Mapping[str, str], *, everything: bool = True) -> None:
        self.phase = Phase.UNDECIDED
        self.everything = everything
        self.own: WeakSet[Any] = WeakSet()
        self.used: Callable[[], bool] = lambda: True
        """Asked when a handle is entered before it is known whether the kit is in use."""
        self.isolation = "rollback"
        """That of the test which is about to run."""
        self.clones_wanted = False
        """Whether any test of the run has isolation clone."""
        self.sandbox: Any = None
        self.preparing: Any = None
        """Makes the sources that lead to the database being prepared."""
        self._mapped = mapped
        self._primary: str | None = None
        self._primary_origin = ""

    def intercepts(self, owner: object) -> bool:
        """Whether the handles of this manager are led to the test's database."""
        return self.everything or (owner is not None and owner in self.own)

    def judge(self, spec: ConnectionSpec, owner: object = None) -> bool:
        """Accept or refuse a configuration; gives whether its handle is intercepted."""
        if not self.intercepts(owner):
            return False
        if owner is None or owner not in self.own:
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

    def source(self, handle: HandleLike) -> Any:
        """Give what to borrow from now, `None` for the handle's own; raises SandboxError."""
        phase = self.phase
        if phase is Phase.TEST and self.everything:
            return self.sandbox.source(handle)
        return self._other_source(handle, "source")

    def async_source(self, handle: HandleLike) -> Any:
        """Give what to borrow from now, `None` for the handle's own; raises SandboxError."""
        phase = self.phase
        if phase is Phase.TEST and self.everything:
            return self.sandbox.async_source(handle)
        return self._other_source(handle, "async_source")

    def _other_source(self, handle: HandleLike, method: str) -> Any:
        if not self.intercepts(handle._owner):
            return None
        if self.phase is Phase.TEST:
            return getattr(self.sandbox, method)(handle)
        if self.phase is Phase.PREPARING:
            return getattr(self.preparing, method)(handle)
        if self.phase is Phase.UNDECIDED and not self.used():
            return None
        raise SandboxError(
            f"{handle!r} is used outside of a test that has a database. Let the test ask for one: "
            "with a fixture (pgmonkey, pgmonkey_connection, pgmonkey_pool, …) or with "
            "@pytest.mark.pgmonkey; a session fixture can write to the prepared database inside "
            "`with pgmonkey_database.unblock():`."
        )
