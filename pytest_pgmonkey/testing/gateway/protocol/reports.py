"""Errors and notices, from psycopg's objects and ours to the wire's messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from ....errors import SandboxError
from ...sandbox.core.refusals import RefusedError, WaitRefusedError, explanation
from . import wire

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult


class AnsweredError(Exception):
    """A statement has failed: the server's own ErrorResponse."""

    def __init__(self, raw: bytes, offset: int = 0) -> None:
        super().__init__(raw)
        self.fields = wire.fields_of(raw)
        self.offset = offset
        self.hint = ""

    @property
    def sqlstate(self) -> str:
        """The error's code."""
        return self.fields.get("C", b"").decode()

    @property
    def text(self) -> str:
        """The error's message."""
        return self.fields.get("M", b"").decode(errors="replace")


class ClientError(Exception):
    """What a client does is refused here, as the server would."""

    def __init__(self, sqlstate: str, text: str) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


def error_report(error: Exception, *, offset: int = 0, severity: str = "") -> bytes:
    """Give the ErrorResponse of an error; `offset` is added to where in the string it was."""
    if isinstance(error, AnsweredError):
        fields, offset, hint = error.fields, error.offset, error.hint
    elif isinstance(error, psycopg.Error) and error.pgresult is not None:
        fields, hint = _result_fields(error.pgresult), explanation(error)
    else:
        return wire.failure(_sqlstate(error), str(error), severity or "ERROR")
    if offset and "P" in fields:
        fields = {**fields, "P": b"%d" % max(1, int(fields["P"]) + offset)}
    if severity:
        fields = {**fields, **dict.fromkeys("SV", severity.encode())}
    if hint:
        fields = {**fields, "H": b"\n".join(filter(None, [fields.get("H"), hint.encode()]))}
    return wire.report(b"E", fields)


def _sqlstate(error: Exception) -> str:
    if isinstance(error, WaitRefusedError):
        return "55P03"
    if isinstance(error, RefusedError):
        return "0A000"
    if isinstance(error, SandboxError):
        return "57P03"
    if isinstance(error, wire.ProtocolViolation):
        return "08P01"
    return getattr(error, "sqlstate", None) or "XX000"


def notice_report(result: PGresult) -> bytes:
    """Give the NoticeResponse of a notice that libpq has read."""
    return wire.report(b"N", _result_fields(result))


def _result_fields(result: Any) -> dict[str, bytes]:
    found = {chr(field): result.error_field(field) for field in pq.DiagnosticField}
    return {letter: value for letter, value in found.items() if value is not None}
