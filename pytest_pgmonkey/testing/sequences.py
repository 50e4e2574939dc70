"""Positions of a database's sequences, and how they are restored.

PostgreSQL does not undo `nextval` and `setval`. So in a database of ours `setval` does it, whether
in a transaction or not. In one that is not ours nothing may be moved for good: there
`ALTER SEQUENCE … RESTART` gives the test's transaction a state of its own, which goes with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psycopg
from psycopg import pq

from .isolation import KitError
from .sandbox.core.driver import error_from_result, limited
from .sandbox.core.handover import change_hands

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from psycopg.pq.abc import PGresult

    from .sandbox.core.backend import Backend
    from .sandbox.core.outer import OuterTransaction

    Steps = Generator[Any, Any, Any]

__all__ = ["Position", "Sequences"]

_PATIENCE: Final = 30.0
# Those that nobody can move here are left alone; to bring one back asks for more than nextval().
# No joins: to plan them takes longer than all the rest.
_LIST: Final = b"""\
SELECT oid, pg_catalog.format('%%s.%%I', relnamespace::pg_catalog.regnamespace, relname),
  pg_catalog.pg_has_role(relowner, 'USAGE'),
  pg_catalog.has_sequence_privilege(oid, 'UPDATE')
    AND pg_catalog.has_sequence_privilege(oid, 'SELECT'), %s
FROM pg_catalog.pg_class
WHERE CASE WHEN relkind = 'S' AND relpersistence <> 't'
  THEN pg_catalog.has_sequence_privilege(oid, 'USAGE, UPDATE') END"""
_STAND: Final = b"pg_catalog.pg_get_sequence_data(oid)::pg_catalog.text"  # from 18 on
# The shortest for the server. Where a transaction can only read, nothing has moved.
_SET: Final = """\
SELECT pg_catalog.setval(pg_catalog.unnest('{%s}'::pg_catalog.oid[]),
  pg_catalog.unnest('{%s}'::pg_catalog.int8[]), pg_catalog.unnest('{%s}'::pg_catalog.bool[]))
WHERE pg_catalog.current_setting('transaction_read_only') = 'off'"""
# What the session has fetched ahead for CACHE, and what currval() gives: a new session has none.
_DISCARD: Final = b"DISCARD SEQUENCES"
_AS_OURSELVES: Final = b"SET LOCAL ROLE NONE"  # a file's settings may name another role
_OPEN: Final = b"SAVEPOINT _pgmonkey_sequences"
_SHUT: Final = b"ROLLBACK TO _pgmonkey_sequences; RELEASE _pgmonkey_sequences"
# Not in a block of its own, in which a late cancel request would leave the session. The commit must
# wait for no disk.
_ALONE: Final = (b"SET TRANSACTION READ WRITE", b"SET LOCAL synchronous_commit = off")
_FATAL: Final = pq.ExecStatus.FATAL_ERROR


class Position(NamedTuple):
    """The position of a sequence: its last value, and whether that was given out."""

    oid: int
    name: str
    """Quoted, with its schema."""
    last: int
    is_called: bool
    is_owned: bool
    """Whether the role may alter it."""
    is_settable: bool


def set_back(positions: Iterable[Position]) -> list[bytes]:
    """Give the commands that restore sequences, whatever is rolled back afterwards."""
    # One statement, for those that have not moved, too: to find them takes longer.
    columns = zip(*((p.oid, p.last, str(p.is_called)) for p in positions), strict=True)
    values = tuple(",".join(map(str, column)) for column in columns)
    return [(_SET % values).encode(), _DISCARD] if values else [_DISCARD]


def restart(positions: Iterable[Position], patience: float) -> list[bytes]:
    """Give the commands that do so for the current transaction alone.

    Others who use a sequence in their transactions are waited for no longer than that, in seconds.
    """
    positions = list(positions)
    alter = [f"ALTER SEQUENCE {p.name} RESTART WITH {p.last}".encode() for p in positions]
    return [
        b"SET LOCAL lock_timeout = %d" % max(1, round(patience * 1000)),
        *alter,
        b"SET LOCAL lock_timeout TO DEFAULT",
        # In what ALTER has made, which nobody else sees.
        *set_back(position for position in positions if position.is_called),
    ]


class Sequences:
    """The sequences of the database that a test process works in."""

    def __init__(self, outer: OuterTransaction, *, is_existing: bool) -> None:
        self._outer = outer
        self._is_existing = is_existing
        self._positions: list[Position] | None = None
        self._found: dict[object, list[Position]] = {}

    @property
    def are_known(self) -> bool:
        """Whether their positions are known."""
        return self._positions is not None

    @property
    def are_locked(self) -> bool:
        """Whether others may wait for them until the transaction ends."""
        return self._is_existing and self._positions is not None

    def note(self) -> None:
        """Note their present positions as those to restore; no scope is open."""
        with self._outer.joining:
            self._positions = self._drive(_find, self._outer.live())

    def forget(self) -> None:
        """Forget that, because data was written that stays."""
        self._positions = None

    def bring_back(self) -> None:
        """Restore them; no test runs, and no scope is open.

        In a database that is not ours, for the transaction that begins with it. Raises KitError.
        """
        with self._outer.joining:
            backend = self._outer.live()
            if self._positions is None:
                self._positions = self._drive(_find, backend)
            self._check(self._positions)
            if self._is_existing:
                self._drive(_restart, backend, self._positions, self._outer.wait_timeout)
            else:
                self._drive(_set_back, backend, self._positions)

    def settle(self) -> None:
        """Wait until what was sent is done: others go on from it, or wait for sequences."""
        if self._outer.is_open:
            with self._outer.joining:
                self._drive(_collect, self._outer.live())

    def enter(self, inside: object) -> None:
        """Remember where wider scopes have left them, for `leave`; what begins is `inside` those.

        In a database that is not ours, have the transaction that was just narrowed move its own.
        """
        with self._outer.joining:
            backend = self._outer.live()
            positions = self._drive(_find, backend)
            self._check(positions)
            if not self._is_existing:
                self._found[inside] = positions
            elif self._outer.in_test:
                self._drive(_restart, backend, positions, self._outer.wait_timeout)

    def leave(self, inside: object) -> None:
        """Restore their positions from before."""
        positions = self._found.pop(inside, None)
        if positions and self._outer.is_open and not self._outer.spoiled:
            with self._outer.joining:
                self._drive(_set_back, self._outer.live(), positions)

    def rename(self, inside: object, name: object) -> None:
        """Have what was entered be left by another name."""
        if inside in self._found:
            self._found[name] = self._found.pop(inside)

    def _drive(self, steps: Any, backend: Backend, *arguments: Any) -> Any:
        try:
            return backend.root.wait(limited(steps(backend, *arguments), _PATIENCE))
        except (psycopg.Error, TimeoutError) as error:
            raise KitError(
                f"the sequences of the database {self._dbname!r} cannot be restarted: {error}"
            ) from error

    def _check(self, positions: list[Position]) -> None:
        """Raise KitError where one cannot be brought back."""
        for position in positions:
            if not (position.is_settable and (position.is_owned or not self._is_existing)):
                needs = "own it" if self._is_existing else "have SELECT and UPDATE on it"
                raise KitError(
                    f"sequences='restart': the role cannot restart the sequence {position.name} "
                    f"of the database {self._dbname!r}. Let it {needs}, or use sequences='count'"
                )

    @property
    def _dbname(self) -> str:
        return self._outer.conninfo.get("dbname", "")


def _collect(backend: Backend) -> Steps:
    if backend.behind:
        yield from backend.collect()


def _find(backend: Backend) -> Generator[Any, Any, list[Position]]:
    """Read the positions of all sequences that this role can move."""
    is_new = backend.pgconn.server_version >= 180000
    listing = _LIST % (_STAND if is_new else b"NULL")
    listed, _ = yield from _by_itself(backend, [listing, _DISCARD])
    rows = [[listed.get_value(i, j) or b"" for j in range(5)] for i in range(listed.ntuples)]
    if is_new:
        stand = [row[4].strip(b"()").split(b",") for row in rows]
    else:
        stand = yield from _read(backend, [row[1] if row[3] == b"t" else b"" for row in rows])
    return [_position(row, at) for row, at in zip(rows, stand, strict=True)]


def _read(backend: Backend, names: Iterable[bytes]) -> Generator[Any, Any, list[list[bytes]]]:
    """Read positions of sequences; the name is empty if the role may not read one."""
    queries = [
        b"SELECT last_value, is_called FROM " + name if name else b"SELECT 0, false"
        for name in names
    ]
    results = yield from _by_itself(backend, queries)
    return [[result.get_value(0, i) or b"" for i in range(2)] for result in results]


def _position(row: list[bytes], stand: list[bytes]) -> Position:
    oid, name, is_owned, is_settable = row[:4]
    return Position(
        int(oid),
        name.decode(),
        int(stand[0] or 0),
        stand[1] == b"t",
        is_owned == b"t",
        is_settable == b"t",
    )


def _by_itself(backend: Backend, commands: list[bytes]) -> Generator[Any, Any, list[PGresult]]:
    """Run commands of which nothing stays but what no rollback undoes, and give their answers."""
    yield from _collect(backend)
    inside = backend.is_begun
    before = [*((_OPEN,) if inside else _ALONE), _AS_OURSELVES]
    line = b"; ".join([*before, *commands, *((_SHUT,) if inside else ())])
    while True:
        results = yield from backend.attempt(line)
        if results[-1].status != _FATAL:
            return results[len(before) : len(before) + len(commands)]
        if inside:
            yield from backend.run(_SHUT)
        if not backend.is_canceled(results):
            raise error_from_result(results[-1])


def _set_back(backend: Backend, positions: list[Position]) -> Steps:
    """Restore sequences; forget those that were dropped for good since."""
    try:
        yield from _by_itself(backend, set_back(positions))
    except psycopg.Error:
        there = {position.oid for position in (yield from _find(backend))}
        if there.issuperset(position.oid for position in positions):
            raise
        positions[:] = [position for position in positions if position.oid in there]
        yield from _by_itself(backend, set_back(positions))


def _restart(backend: Backend, positions: list[Position], patience: float) -> Steps:
    """Give the current frame of the transaction its own sequence positions."""
    yield from _collect(backend)
    if backend.settings_of is not None:
        yield from change_hands(backend, None, between=True)
    yield from backend.stand()
    yield from backend.keep(restart(positions, patience))
