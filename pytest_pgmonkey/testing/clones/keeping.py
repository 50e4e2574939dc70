"""Keeps the databases of failed tests in clone isolation beyond their run."""

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
from .isolation import CloneIsolation

if TYPE_CHECKING:
    from ..isolation import Isolation
    from ..servers.server import Server

__all__ = ["Keeping"]


class Keeping:
    """Follows the tests of a process, and keeps the clones of those that fail.

    Whether a clone is kept is known when its test's teardown has been reported: a clone is held
    until then. What it will be called is told with the failure, where people look for it.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._test = ""
        self._failed = self._refused = False
        self._plan: Kept | None = None
        self._held: CloneIsolation | None = None
        self._last: Kept | None = None

    def hold(self, ended: CloneIsolation) -> None:
        """Take over the clone of a test that has used it for the last time."""
        self._let_go()
        self._held = ended

    def close(self) -> None:
        """Keep what was promised, also where the run ends before the test's teardown does."""
        if self._plan is not None:
            self._settle()

    def see(self, test: str, when: str, *, failed: bool, running: Isolation) -> str:
        """Take note of a phase of a test; give what its report should tell, if anything.

        `running` is what the test runs in now.
        """
        if when == "setup":
            self._begin(test)
        self._failed |= failed
        if when == "teardown":
            return self._settle()
        cloned = isinstance(running, CloneIsolation)
        return self._announce() if failed and cloned and self._plan is None else ""

    def _begin(self, test: str) -> None:
        self._let_go()
        if self._last is not None and self._last.test == test:
            with contextlib.suppress(KeptError):
                remove(self._last)  # it is run again: only the last attempt counts
        self._test = test
        self._failed = self._refused = False
        self._plan = self._last = None

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.give_back()

    def _announce(self) -> str:
        """Decide what the database will be called."""
        try:
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
            if self._plan is not None:
                told = self._keep(self._held, self._plan) or told
        self._let_go()
        return told

    def _keep(self, held: CloneIsolation, plan: Kept) -> str:
        """Keep a clone; gives what went wrong."""
        try:
            kept = plan.save()
        except KeptError as error:
            return f"The database of this test is not kept after all: {error}"
        try:
            assert kept.file is not None
            self._server.outlive(kept.file)
            self._server.rename_database(held.name, plan.name)
        except (PGMonkeyError, psycopg.Error, OSError) as error:
            with contextlib.suppress(KeptError):
                kept.forget()
            text = redact_text(str(error))
            return f"The database of this test is not kept after all: {text}"
        self._held, self._last = None, kept
        remove_old()
        return ""
