"""Schema steps: SQL files, directories of them and functions, run once into a new database."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import PGMonkeyError
from ..options import is_function

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["SchemaError", "listed", "load_schema", "resolve_steps"]

# pg_dump's newer releases write them, for psql alone.
_RESTRICT: Final = re.compile(r"^\\(?:un)?restrict .*$", re.MULTILINE)
# Before PostgreSQL 15 the message has the path alone.
_NO_EXTENSION: Final = re.compile(
    r'extension "(?P<name>[^"]+)" is not available|(?P<file>[^/\\"]+)\.control\b'
)
_COPY: Final = re.compile(r"COPY\b.*\bFROM\s+STDIN\b", re.IGNORECASE | re.DOTALL)


class SchemaError(PGMonkeyError):
    """A schema step is not there, or fails; the message names file, line and server's words."""


def listed(steps: Any) -> list[Any]:
    """Turn what a fixture gives into a list of steps; one step may stand alone.

    Raises SchemaError.
    """
    if isinstance(steps, (str, Path)) or callable(steps):
        return [steps]
    try:
        return list(steps)
    except TypeError:
        raise SchemaError(
            f"the fixture pgmonkey_schema gives {steps!r}, which is no list of schema steps"
        ) from None


def resolve_steps(steps: Iterable[Any], rootdir: Path) -> list[Path | Callable[[Any], Any]]:
    """Turn steps as users write them into SQL files and functions; raises SchemaError."""
    resolved: list[Path | Callable[[Any], Any]] = []
    for step in steps:
        if callable(step):
            resolved.append(_judge(step))
        elif isinstance(step, str) and is_function(step):
            resolved.append(_judge(_function(step, rootdir)))
        elif isinstance(step, (str, Path)):
            resolved.extend(_files(rootdir / step))
        else:
            raise SchemaError(
                f"schema step {step!r}: must be a path, 'module:function' or a function"
            )
    return resolved


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".sql")
        if not files:
            raise SchemaError(f"schema directory {path} holds no .sql file")
        yield from files
    elif path.is_file():
        yield path
    else:
        raise SchemaError(f"schema path {path} does not exist")


def _function(step: str, rootdir: Path) -> Callable[[Any], Any]:
    module_name, _, name = step.partition(":")
    module = _import(module_name, step, rootdir)
    function = getattr(module, name, None)
    if function is None:
        raise SchemaError(f"schema step {step}: module {module_name!r} has no {name!r}")
    if not callable(function):
        raise SchemaError(f"schema step {step}: {name!r} is not callable")
    return function  # type: ignore[no-any-return]


def _judge(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Refuse a function whose body would not run when it is called."""
    asynchronous = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    if asynchronous or inspect.isgeneratorfunction(function):
        kind = "async" if asynchronous else "a generator"
        raise SchemaError(
            f"schema step {_name(function)} is {kind}: it must be a plain function, which is "
            "called with a sync connection"
        )
    return function


def _name(function: Callable[[Any], Any]) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', function)}"


def _import(module_name: str, step: str, rootdir: Path) -> Any:
    # Like `python -m pytest`, which puts the directory it is called from on the path.
    added = str(rootdir)
    sys.path.append(added)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # what an import may raise is the module's business
        problem = f"{type(error).__name__}: {error}"
        raise SchemaError(f"schema step {step} cannot be imported: {problem}") from None
    finally:
        sys.path.remove(added)


def load_schema(
    steps: Iterable[Path | Callable[[Any], Any]],
    connect: Callable[[], Any],
    advice: Callable[[str, str], str],
) -> None:
    """Run the steps one after the other, each on a connection of its own; raises SchemaError.

    SQL files run statement by statement in autocommit, as psql runs them; a function gets a
    connection in a transaction that is committed after it. `advice` is asked for with the name of
    an extension that the server does not have, and its words.
    """
    for step in steps:
        with connect() as conn:
            if isinstance(step, Path):
                conn.autocommit = True
                _run_file(conn, step, advice)
            else:
                _run_function(conn, step, advice)


def _end(error: BaseException) -> str:
    return "" if str(error).endswith(".") else "."


def _advice(error: BaseException, advice: Callable[[str, str], str]) -> str:
    """Say where an extension is to be had that the server lacks, if that is what an error tells.

    What a step has raised may have been caused by it, as SQLAlchemy's errors are.
    """
    from psycopg import errors

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.FeatureNotSupported | errors.UndefinedFile):
            problem = cause.diag.message_primary or ""
            if found := _NO_EXTENSION.search(problem):
                return f"{_end(error)}{advice(found['name'] or found['file'], problem)}"
        cause = cause.__cause__ or cause.__context__
    return ""


def _run_function(
    conn: Any, function: Callable[[Any], Any], advice: Callable[[str, str], str]
) -> None:
    from psycopg.pq import TransactionStatus

    name = _name(function)
    lost = _watch_close(conn)
    try:
        function(conn)
    except (Exception, SystemExit) as error:
        place = _place_in(error, function)
        raise SchemaError(
            f"schema step {name}{place} failed: {type(error).__name__}: {error}"
            f"{_advice(error, advice)}"
        ) from error
    if lost:
        raise SchemaError(
            f"schema step {name} has closed its connection without a commit, so nothing of it is "
            "kept: leave the connection open, it is committed after the step"
        )
    if conn.info.transaction_status == TransactionStatus.INERROR:
        raise SchemaError(
            f"schema step {name} has swallowed the error of a statement, so nothing of it is kept: "
            "put a statement that may fail in `with conn.transaction():`"
        )


def _watch_close(conn: Any) -> list[bool]:
    """Give a list that is no longer empty when the connection is closed in a transaction."""
    from psycopg.pq import TransactionStatus

    lost: list[bool] = []
    close = conn.close

    def watched() -> None:
        if not conn.closed and conn.info.transaction_status != TransactionStatus.IDLE:
            lost.append(True)
        close()

    conn.close = watched
    return lost


def _place_in(error: BaseException, function: Callable[[Any], Any]) -> str:
    """Say on which line of the step's own file it failed."""
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    place, traceback = "", error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == own:
            place = f" ({own}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


def _run_file(conn: Any, path: Path, advice: Callable[[str, str], str]) -> None:
    import psycopg

    from ..sql.lexer import statements

    try:
        text = _RESTRICT.sub("", path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: cannot be read: {error}") from None
    position = 0
    for statement in statements(text):
        start = text.index(statement.text, position)
        position = start + len(statement.text)
        if _COPY.match(statement.text):
            line = text.count("\n", 0, start) + 1
            raise SchemaError(
                f"{path}, line {line}: COPY FROM stdin needs psql, which sends the lines after it: "
                "write INSERT statements (pg_dump --inserts), or load the data in a function"
            )
        try:
            conn.execute(statement.text)
        except psycopg.Error as error:
            problem = _describe(path, text, start, statement.text, error)
            raise SchemaError(f"{problem}{_advice(error, advice)}") from None


def _describe(path: Path, text: str, start: int, statement: str, error: Any) -> str:
    offset = start + int(error.diag.statement_position or 1) - 1
    line = text.count("\n", 0, offset) + 1
    problem = error.diag.message_primary or str(error)
    hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
    if statement.startswith("\\"):
        hint = " (psql's own commands, which begin with a backslash, are not SQL)"
    return f"{path}, line {line}: {problem}{hint}"
