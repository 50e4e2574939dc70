"""Keeps the databases of failed tests beyond their run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import psycopg

from ...errors import PGMonkeyError
from ...kept_databases import (
    Kept,
    KeptError,
    describe,
    new_name,
    remove,
    remove_old,
    writable_directory,
)
from ...secrets import redact_text

if TYPE_CHECKING:
    from typing import Final

    from ..isolation import Isolation
    from ..servers.server import Server
    from .isolation import CloneIsolation

__all__ = ["Keeping"]

_AFTER_ALL: Final = "The database of this test is not kept after all: {}"


class Keeping:
    """Follows the tests of a process, and keeps the databases of those that fail.

    Whether a clone is kept is known when its test's teardown has been reported: a clone is held
    until then. The database that other tests use, too, is kept before the next of them begins, so
    only where the test has failed by then. What it will be called is told with the failure, where
    people look for it.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._test = ""
        self._failed = self._refused = False
        self._plan: Kept | None = None
        self._problem = ""
        self._held: CloneIsolation | None = None
        self._last: Kept | None = None

    def hold(self, ended: CloneIsolation) -> None:
        """Take over a clone that its test no longer uses."""
        self._let_go()
        self._held = ended

    def close(self) -> None:
        """Keep what was promised, even if the run ends before the test's teardown does."""
        if self._plan is not None:
            self._settle()

    def see(
        self, test: str, when: str, *, failed: bool, running: Isolation | None, obstacle: str
    ) -> str:
        """Take note of a phase of a test; give what its report should tell, if anything.

        `running` is what the test runs in now, if in anything; `obstacle` why its database cannot
        be kept.
        """
        if when == "setup":
            self._begin(test)
        self._failed |= failed
        if when == "teardown":
            return self._settle()
        is_first = self._plan is None and not self._refused
        return self._announce(obstacle) if failed and is_first and running is not None else ""

    @property
    def is_promised(self) -> bool:
        """Whether the report of the running test has told that its database is kept."""
        return self._plan is not None

    def keep(self, name: str) -> bool:
        """Keep a database as announced; nothing will use it any more."""
        assert self._plan is not None
        self._problem = self._keep(name, self._plan)
        return not self._problem

    def fail(self, problem: str) -> None:
        """Note why a database is not kept although it was told so."""
        self._problem = _AFTER_ALL.format(problem)

    def _begin(self, test: str) -> None:
        self._let_go()
        if self._last is not None and self._last.test == test:
            with contextlib.suppress(KeptError):
                remove(self._last)  # it is run again: only the last attempt counts
        self._test = test
        self._failed = self._refused = False
        self._plan = self._last = None
        self._problem = ""

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.give_back()

    def _announce(self, obstacle: str = "") -> str:
        """Decide what the database will be called."""
        try:
            if obstacle:
                raise KeptError(obstacle)
            writable_directory()
            self._plan = self._server.kept_as(new_name(self._test), self._test)
        except PGMonkeyError as error:
            self._refused = True
            return f"The database of this test is not kept: {error}"
        told = describe(self._plan)
        lines = [
            f"The database of this test is kept: {self._plan.name}",
            f"DSN: {told['DSN']}",
            told["psql"],
            f"pgmonkey kept --remove {self._plan.name}",
        ]
        return "\n".join([*lines, f"({told['note']})"] if "note" in told else lines)

    def _settle(self) -> str:
        """Keep the clone of the test that has ended, or give it back."""
        told = ""
        if self._failed and self._held is not None and not self._refused:
            told = "" if self._plan else self._announce()
            if self._plan is not None and self.keep(self._held.name):
                self._held = None
        self._let_go()
        return self._problem or told

    def _keep(self, name: str, plan: Kept) -> str:
        """Keep a database; gives what went wrong."""
        try:
            kept = plan.save()
        except KeptError as error:
            return _AFTER_ALL.format(error)
        try:
            assert kept.file is not None
            self._server.outlive(kept.file)
            self._server.rename_database(name, plan.name)
        except (PGMonkeyError, psycopg.Error, OSError) as error:
            with contextlib.suppress(KeptError):
                kept.forget()
            return _AFTER_ALL.format(redact_text(str(error)))
        self._last = kept
        remove_old()
        return ""
