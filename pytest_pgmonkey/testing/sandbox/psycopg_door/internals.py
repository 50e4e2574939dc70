"""All that the sandbox uses of psycopg's private side, checked against the installed version.

Functions over cursors, connections and generators; which methods `connections.py` overrides is
said and checked here, too.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import AsyncConnection, Connection, pq

from ...passage import ARGUMENTS
from ..core.driver import unsupported

try:
    from psycopg._connection_base import BaseConnection
    from psycopg._cursor_base import BaseCursor
    from psycopg._preparing import Prepare, PrepareManager
    from psycopg.pq.misc import connection_summary
    from psycopg.transaction import BaseTransaction
except ImportError as error:
    # Without the path of the module, which is no help.
    raise unsupported([error.msg.partition(" (")[0]]) from error

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from psycopg.pq.abc import PGconn, PGresult


def _owner(cls: type[Any], name: str) -> Any:
    """Give the class that defines a method: modules move between psycopg's releases."""
    return next((each for each in cls.__mro__ if name in each.__dict__), cls)


BasePipeline: Final = _owner(psycopg.Pipeline, "_sync_gen")
ServerCursorMixin: Final = _owner(psycopg.ServerCursor, "_declare_gen")

__all__ = ["BaseConnection", "BasePipeline", "check_psycopg", "connection_summary"]

STATEMENT: Final = "statement"
DECLARE: Final = "declare"
CONTROL: Final = "control"
LOCAL: Final = "local"
CLOSE: Final = "close"
OTHER: Final = "other"

# What an operation is, by its generator function: its kind, and the variable with its SQL.
_OPERATIONS: Final = {
    (BaseCursor, "_execute_gen"): (STATEMENT, "query"),
    (BaseCursor, "_executemany_gen_pipeline"): (STATEMENT, "query"),
    (BaseCursor, "_executemany_gen_no_pipeline"): (STATEMENT, "query"),
    (BaseCursor, "_stream_send_gen"): (STATEMENT, "query"),
    (BaseCursor, "_start_copy_gen"): (STATEMENT, "statement"),
    (ServerCursorMixin, "_declare_gen"): (DECLARE, "query"),
    (ServerCursorMixin, "_close_gen"): (CLOSE, "self"),
    (BaseConnection, "_commit_gen"): (CONTROL, ""),
    (BaseConnection, "_rollback_gen"): (CONTROL, ""),
    (BaseTransaction, "_enter_gen"): (CONTROL, ""),
    (BaseTransaction, "_exit_gen"): (CONTROL, ""),
    (BaseConnection, "_set_autocommit_gen"): (LOCAL, ""),
    (BaseConnection, "_set_isolation_level_gen"): (LOCAL, ""),
    (BaseConnection, "_set_read_only_gen"): (LOCAL, ""),
    (BaseConnection, "_set_deferrable_gen"): (LOCAL, ""),
}
_OVERRIDDEN: Final = (
    "_cancel_gen",
    "_check_connection_ok",
    "_check_intrans_gen",
    "_check_tpc",
    "_deallocate",
    "_exec_command",
    "_get_tx_start_command",
    "_start_query",
)
# What else is used of these classes.
_NAMES: Final = {
    Connection: _OVERRIDDEN,
    AsyncConnection: _OVERRIDDEN,
    BaseConnection: ("_notice_handler", "_should_cancel"),
    BasePipeline: ("_enter_gen", "_exit", "_exit_gen", "_fetch_gen", "_sync_gen"),
    BaseCursor: (
        "_check_results",
        "_convert_query",
        "_last_query",
        "_reset",
        "_set_results",
        "_tx",
    ),
    ServerCursorMixin: ("_withhold",),
    PrepareManager: ("_should_discard",),
}
_ATTRIBUTES: Final = (
    "_adapters",
    "_autocommit",
    "_closed",
    "_notice_handlers",
    "_notifies_backlog",
    "_notify_handlers",
    "_num_transactions",
    "_pipeline",
    "_prepared",
    "lock",
    "pgconn",
)
_PREPARED_ATTRIBUTES: Final = ("_counts", "_names", "_prepared_idx")


def _operation_codes() -> dict[int, tuple[str, str]]:
    # By identity: to hash a code object takes as long as a statement.
    codes: dict[int, tuple[str, str]] = {}
    for (cls, name), operation in _OPERATIONS.items():
        codes[id(getattr(cls, name).__code__)] = operation
    return codes


def check_psycopg() -> None:
    """Raise SandboxError naming what has moved if the installed psycopg is not supported."""
    missing = [f"{c.__name__}.{n}" for c, n in _OPERATIONS if not hasattr(c, n)]
    for cls, names in _NAMES.items():
        missing += [f"{cls.__name__}.{n}" for n in names if not hasattr(cls, n)]
    prepared = PrepareManager()
    missing += [f"PrepareManager.{n}" for n in _PREPARED_ATTRIBUTES if not hasattr(prepared, n)]
    for (owner, name), (_, variable) in _OPERATIONS.items():
        code = getattr(getattr(owner, name, None), "__code__", None)
        if variable and code is not None and variable not in code.co_varnames:
            missing.append(f"{owner.__name__}.{name}({variable})")
    _refuse_if(missing)


def _refuse_if(missing: list[str]) -> None:
    if missing:
        raise unsupported(missing)


try:
    _CODES: Final = _operation_codes()
except AttributeError:
    check_psycopg()
    raise


EXECUTE: Final = BaseCursor._execute_gen.__code__
_STREAM: Final = BaseCursor._stream_send_gen.__code__
_FRUITLESS: Final = 3
_QUEUED: Final = (EXECUTE, BaseCursor._executemany_gen_pipeline.__code__)


_ENDS: Final = {
    id(BaseConnection._commit_gen.__code__): "COMMIT",
    id(BaseConnection._rollback_gen.__code__): "ROLLBACK",
}


def end_of(gen: Any) -> str:
    """Give what psycopg's commit() or rollback() is about to send; empty for other operations."""
    return _ENDS.get(id(getattr(gen, "gi_code", None)), "")


def register_control(function: Any) -> None:
    """Let a generator function of ours pass `wait()` as transaction control does."""
    _CODES[id(function.__code__)] = (CONTROL, "")


def read_operation(gen: Any) -> tuple[str, Any, Any]:
    """Give an operation's kind, its SQL (or `None`) and its cursor or connection.

    `gen` may be the arguments of a statement instead, where they have been read already.
    """
    if type(gen) in ARGUMENTS:
        return STATEMENT, gen["query"], gen["self"]
    kind, variable = _CODES.get(id(getattr(gen, "gi_code", None)), (OTHER, ""))
    if not variable:
        return kind, None, None
    names = gen.gi_frame.f_locals
    return kind, names[variable], names["self"]


def arguments(gen: Any) -> Any:
    """Give the arguments of an operation that has not begun, by their names."""
    return gen.gi_frame.f_locals


def parameters(operation: Any) -> Any:
    """Give the parameters of an operation that has not begun, or those among its arguments."""
    names = operation if type(operation) in ARGUMENTS else arguments(operation)
    return names.get("params")


def query_text(sql: Any, conn: Any) -> str:
    """Give the SQL of a query in any of the forms that psycopg takes; "" where it cannot be had."""
    if type(sql) is str:
        return sql
    if isinstance(sql, bytes):
        return sql.decode(errors="replace")
    if isinstance(sql, psycopg.sql.Composable):
        try:
            return sql.as_string(conn)
        except Exception:  # a value that cannot be adapted: psycopg says so, after its BEGIN
            return ""
    strings = getattr(sql, "strings", None)  # a template string, from Python 3.14 on
    return " $1 ".join(strings) if strings is not None else str(sql)


def is_execute(gen: Any) -> bool:
    """Whether an operation is a plain execute()."""
    return bool(gen.gi_code is EXECUTE)


def is_queued(gen: Any) -> bool:
    """Whether an operation is one that pipelines have."""
    return gen.gi_code in _QUEUED


def is_stream(gen: Any) -> bool:
    """Whether an operation begins a `stream()`."""
    return bool(gen.gi_code is _STREAM)


def answer_queue(pipeline: Any) -> Generator[Any, Any, psycopg.Error | None]:
    """Sync a pipeline and take all of its results; gives the first error among them."""
    first: psycopg.Error | None = None
    steps, fruitless = BasePipeline._sync_gen(pipeline), 0
    while fruitless < _FRUITLESS:
        before = len(pipeline.result_queue)
        try:
            yield from steps
        except psycopg.Error as error:
            first = first or error
        if not pipeline.result_queue:
            break
        # After an error psycopg leaves the rest of the results for the next operation to take.
        fruitless = fruitless + 1 if len(pipeline.result_queue) >= before else 0
        steps = pipeline._fetch_gen(flush=False)
    pipeline.command_queue.clear()
    pipeline.result_queue.clear()
    return first


def fail_queue(pipeline: Any) -> Generator[Any, Any, None]:
    """Have the server skip all that is queued from now on, up to the next sync."""
    pipeline.pgconn.send_query_params(b"RELEASE _pgmonkey_nothing", None)
    pipeline.result_queue.append(None)
    with suppress(psycopg.Error):
        yield from pipeline._fetch_gen(flush=True)


def is_extended(cursor: Any, gen: Any) -> bool:
    """Whether an execute() uses the extended protocol, which takes one statement only."""
    names = gen.gi_frame.f_locals
    if names.get("params") or names.get("binary") or cursor.format == pq.Format.BINARY:
        return True
    threshold, prepare = cursor.connection.prepare_threshold, names.get("prepare")
    return threshold is not None and prepare is not False and bool(prepare or threshold == 0)


def check_parameters(cursor: Any, text: str, params: Any) -> None:
    """Raise as psycopg does where placeholders and parameters do not agree."""
    cursor._tx = psycopg.adapt.Transformer(cursor)
    cursor._convert_query(text, params)


def holds(cursor: Any) -> bool:
    """Whether a server-side cursor outlives its transaction."""
    return bool(cursor._withhold)


class _TaggedResult(pq.PGresult):  # type: ignore[misc, valid-type]
    """The result of a command that was not sent as it is."""

    tag: bytes

    def __init__(self) -> None:
        """Hold no result of libpq."""
        self._pgresult_ptr = None  # which psycopg's implementation in Python would free

    @property
    def status(self) -> int:
        return pq.ExecStatus.COMMAND_OK

    @property
    def command_status(self) -> bytes:
        return self.tag

    @property
    def command_tuples(self) -> None:
        return None


def tagged_result(tag: bytes) -> Any:
    """Give the result of a command with this status tag."""
    result = _TaggedResult()
    result.tag = tag
    return result


def set_results(cursor: Any, results: list[PGresult]) -> None:
    """Give a cursor the results of statements that were sent one by one."""
    cursor._reset()
    cursor._last_query = None
    cursor._tx = psycopg.adapt.Transformer(cursor)
    cursor._check_results(results)
    cursor._set_results(results)


class Template:
    """Makes the wrappers over one PGconn, ten times as fast as psycopg's constructor.

    The constructor runs once per class, so that the attributes are those of the installed
    version; what must not be shared is made anew for each wrapper.
    """

    def __init__(self, pgconn: PGconn, classes: Iterable[type[Any]]) -> None:
        handlers = pgconn.notice_handler, pgconn.notify_handler
        self._attributes: dict[type, dict[str, Any]] = {}
        for cls in classes:
            conn = cls(pgconn)
            attributes = dict(conn.__dict__)
            _refuse_if([f"{cls.__name__}.{a}" for a in _ATTRIBUTES if a not in attributes])
            conn.__dict__.clear()
            self._attributes[cls] = attributes
        pgconn.notice_handler, pgconn.notify_handler = handlers

    def make(
        self,
        cls: type[Any],
        *,
        autocommit: bool,
        pool: object | None,
        prepared_index: int,
    ) -> Any:
        """Give a connection that nobody else uses, as `connect()` or a pool would."""
        conn: Any = object.__new__(cls)
        fields = conn.__dict__
        fields.update(self._attributes[cls])
        fields["_prepared"] = prepared = PrepareManager()
        prepared._prepared_idx = fields["_prepared_from"] = prepared_index
        fields["_notice_handlers"] = []
        fields["_notify_handlers"] = []
        fields["_notifies_backlog"] = deque()
        fields["lock"] = Lock() if issubclass(cls, Connection) else type(fields["lock"])()
        fields["_autocommit"] = autocommit
        if pool is not None:
            fields["_pool"] = pool
        return conn


def pool_of(conn: Any) -> Any:
    """Give the pool that a connection was borrowed from and is to go back to, or `None`."""
    return getattr(conn, "_pool", None)


def leave_pool(conn: Any) -> None:
    """Have a connection belong to no pool any more."""
    conn._pool = None


@cache
def closed_pgconn() -> PGconn:
    """Give a `PGconn` that was closed, for connections that were."""
    pgconn: PGconn = pq.PGconn.connect_start(b"port=0")
    pgconn.finish()
    return pgconn


def deliver_notice(conn: Any, result: Any) -> None:
    """Hand a server notice to the connection whose statement caused it."""
    BaseConnection._notice_handler(weakref.ref(conn), result)


class _Warning:
    """A notice that the server would give, in the shape of its result."""

    def __init__(self, sqlstate: str, message: str) -> None:
        field = pq.DiagnosticField
        self._fields = {
            field.SEVERITY: b"WARNING",
            field.SEVERITY_NONLOCALIZED: b"WARNING",
            field.SQLSTATE: sqlstate.encode(),
            field.MESSAGE_PRIMARY: message.encode(),
        }

    def error_field(self, field: int) -> bytes | None:
        return self._fields.get(pq.DiagnosticField(field))


def deliver_warning(conn: Any, sqlstate: str, message: str) -> None:
    """Warn a connection of what the server would warn it of."""
    deliver_notice(conn, _Warning(sqlstate, message))


def has_prepared(conn: Any) -> bool:
    """Whether psycopg has prepared statements for the connection, or had and forgot them."""
    return bool(conn._prepared._prepared_idx != conn._prepared_from)


def note_results(conn: Any, results: list[Any]) -> None:
    """Let psycopg find out from status tags whether its prepared statements are gone."""
    conn._prepared._should_discard(Prepare.NO, results)


def forget_prepared(conn: Any) -> None:
    """Forget prepared statements that the server no longer has."""
    conn._prepared._names.clear()
    conn._prepared._counts.clear()
