"""What an SQL string is made of: its statements, and what each means for the transaction around it.

A lexer, not a parser: it knows comments, quotes, dollar quotes, parentheses and `BEGIN ATOMIC`
bodies, so that a word inside one of them is never taken for a statement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from ..timeouts import looks_at_timeouts

if TYPE_CHECKING:
    from collections.abc import Iterator


class Verb(Enum):
    """What a statement does to its transaction."""

    QUERY = auto()  # reads, as far as its own words tell
    WRITE = auto()  # anything else that has no meaning for transactions
    DDL = auto()  # may change which constraints there are
    BEGIN = auto()
    COMMIT = auto()
    ROLLBACK = auto()
    SAVEPOINT = auto()  # SAVEPOINT, RELEASE, ROLLBACK TO
    SET = auto()  # of the session; RESET too
    SET_LOCAL = auto()
    SET_TRANSACTION = auto()
    SET_CONSTRAINTS = auto()
    DECLARE = auto()
    CURSOR = auto()  # FETCH, MOVE, CLOSE: reads, as far as the cursor's query does
    PREPARE = auto()  # PREPARE name AS …
    DEALLOCATE = auto()
    DISCARD = auto()
    LISTEN = auto()
    TWO_PHASE = auto()  # PREPARE TRANSACTION, COMMIT PREPARED, ROLLBACK PREPARED


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of an SQL string.

    `words` are its first words in upper case, as far as they tell what it is; `read_only` says
    that it surely writes nothing (no function is called that could).
    """

    verb: Verb
    words: tuple[str, ...]
    text: str
    read_only: bool = False
    plain: bool = False
    """Nothing but a query or a write: it can be sent as it is in an open transaction."""
    settings: tuple[str, ...] = ()
    """The names that SET or RESET changes; none for RESET ALL."""
    sets_config: bool = False
    """Whether it calls `set_config`, which is SET by another name."""
    temporary: tuple[str, str] | None = None
    """A temporary table that it creates, with `DROP` or `DELETE` for its ON COMMIT."""
    advisory: bool = False
    """Whether it speaks of advisory locks, which a rollback does not give back."""
    prepares: bool = False
    """Whether it makes a prepared statement, as the text of a function may do later on."""
    cursor: str = ""
    """The name of the cursor that it declares, in lower case and without quotes."""
    looks_at_timeouts: bool = False
    """Whether it sets or shows a time-out that ends sessions."""

    @property
    def chains(self) -> bool:
        """Whether the end of the transaction begins the next (`AND CHAIN`)."""
        return self.words[-2:] == ("AND", "CHAIN") and self.words[-3:-2] != ("NO",)

    @property
    def holds(self) -> bool:
        """Whether a cursor that it declares outlives its transaction."""
        return "HOLD" in self.words


_TOKEN: Final = re.compile(
    r"""
      (?P<space>\s+|--[^\n]*)
    | (?P<comment>/\*)
    | (?P<string>[eE]'[^'\\]*(?:(?:\\.|'')[^'\\]*)*(?:'|\Z) | '[^']*(?:''[^']*)*(?:'|\Z))
    | (?P<quoted>"[^"]*(?:""[^"]*)*(?:"|\Z))
    | (?P<dollar>\$(?:[^\W\d]\w*)?\$)
    | (?P<word>[^\W\d][\w$]*)
    | (?P<number>\d[\w.]*)
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")


def _tokens(sql: str) -> Iterator[tuple[str, str, int, int]]:
    """Give kind, text, start and end of everything that is neither space nor comment."""
    position, end = 0, len(sql)
    while position < end:
        match = _TOKEN.match(sql, position)
        assert match is not None  # `other` takes any character
        kind, start, position = str(match.lastgroup), position, match.end()
        if kind == "comment":
            position = _skip_comment(sql, position)
        elif kind == "dollar":
            close = sql.find(match.group(), position)
            position = end if close < 0 else close + len(match.group())
            yield "string", "", start, position
        elif kind != "space":
            yield kind, match.group(), start, position


def _skip_comment(sql: str, position: int) -> int:
    """Give the end of a block comment; PostgreSQL nests them."""
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, position):
        depth += 1 if edge.group() == "/*" else -1
        if not depth:
            return edge.end()
    return len(sql)


class _Draft:
    """A statement while its tokens come in."""

    def __init__(self) -> None:
        self.words: list[str] = []  # every word, upper case; "" for anything that is none
        self.calls: set[str] = set()
        self.start = self.end = -1
        self.parens = 0
        self.atomic = 0

    def add(self, kind: str, text: str, start: int, end: int) -> None:
        if self.start < 0:
            self.start = start
        self.end = end
        if kind == "word":
            self._add_word(text.upper())
            return
        if text == "(":
            self.parens += 1
            if self.words and self.words[-1]:
                self.calls.add(self.words[-1])
        elif text == ")":
            self.parens -= 1
        elif kind == "quoted":
            text = text[1:-1].upper()
            self.words.append(f'"{text}')
            return
        self.words.append("")

    def _add_word(self, word: str) -> None:
        if (word == "ATOMIC" and self.words[-1:] == ["BEGIN"] and self.words[0] == "CREATE") or (
            self.atomic and word == "CASE"
        ):
            self.atomic += 1
        elif self.atomic and word == "END":
            self.atomic -= 1
        self.words.append(word)

    @property
    def open(self) -> bool:
        """Whether a semicolon would be inside this statement."""
        return self.parens > 0 or self.atomic > 0


@lru_cache(maxsize=4096)
def statements(sql: str) -> tuple[Statement, ...]:
    """Split an SQL string; empty statements are left out."""
    found: list[Statement] = []
    draft = _Draft()
    for token in _tokens(sql):
        if token[1] == ";" and token[0] == "other" and not draft.open:
            if draft.start >= 0:
                found.append(_judge(draft, sql[draft.start : draft.end]))
            draft = _Draft()
        else:
            draft.add(*token)
    if draft.start >= 0:
        found.append(_judge(draft, sql[draft.start : draft.end]))
    return tuple(found)


@lru_cache(maxsize=4096)
def plain_statement(sql: str) -> Statement | None:
    """Give the only statement of an SQL string, if it is a plain one."""
    parts = statements(sql)
    return parts[0] if len(parts) == 1 and parts[0].plain else None


_QUERY_WORDS: Final = frozenset({"SELECT", "VALUES", "TABLE", "SHOW", "WITH", "EXPLAIN", ""})
_WRITING_WORDS: Final = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "INTO", "ANALYZE"})
_LOCKING: Final = frozenset({"UPDATE", "SHARE", "NO", "KEY"})
_DDL_WORDS: Final = frozenset({"CREATE", "ALTER", "DROP", "DO", "CALL", "IMPORT"})
_SIMPLE_VERBS: Final = {
    "BEGIN": Verb.BEGIN,
    "END": Verb.COMMIT,
    "ABORT": Verb.ROLLBACK,
    "SAVEPOINT": Verb.SAVEPOINT,
    "RELEASE": Verb.SAVEPOINT,
    "RESET": Verb.SET,
    "DECLARE": Verb.DECLARE,
    "DEALLOCATE": Verb.DEALLOCATE,
    "DISCARD": Verb.DISCARD,
    "LISTEN": Verb.LISTEN,
    "FETCH": Verb.CURSOR,
    "MOVE": Verb.CURSOR,
    "CLOSE": Verb.CURSOR,
}
# Not functions although a parenthesis follows, and functions that surely write nothing.
_HARMLESS_CALLS: Final = frozenset(
    [
        "AND",
        "OR",
        "NOT",
        "IN",
        "AS",
        "ON",
        "ANY",
        "ALL",
        "SOME",
        "EXISTS",
        "SELECT",
        "FROM",
        "WHERE",
        "VALUES",
        "WITH",
        "USING",
        "BY",
        "OVER",
        "FILTER",
        "CASE",
        "WHEN",
        "THEN",
        "ELSE",
        "UNION",
        "EXCEPT",
        "INTERSECT",
        "LATERAL",
        "ARRAY",
        "ROW",
        "INTERVAL",
        "HAVING",
        "LIMIT",
        "OFFSET",
        "BETWEEN",
        "LIKE",
        "ILIKE",
        "GROUP",
        "WITHIN",
        "MATERIALIZED",
        "RECURSIVE",
        "JOIN",
        "DISTINCT",
        "NUMERIC",
        "VARCHAR",
        "CHAR",
        "COUNT",
        "SUM",
        "MIN",
        "MAX",
        "AVG",
        "COALESCE",
        "NULLIF",
        "GREATEST",
        "LEAST",
        "LOWER",
        "UPPER",
        "LENGTH",
        "TRIM",
        "SUBSTRING",
        "ROUND",
        "ABS",
        "NOW",
        "CURRENT_SETTING",
        "TO_CHAR",
        "DATE_TRUNC",
        "EXTRACT",
        "GENERATE_SERIES",
        "UNNEST",
        "ARRAY_AGG",
        "JSON_AGG",
        "JSONB_AGG",
        "JSONB_BUILD_OBJECT",
        "JSON_BUILD_OBJECT",
        "STRING_AGG",
        "ROW_NUMBER",
        "RANK",
        "CAST",
        "CONCAT",
        "PG_BACKEND_PID",
        "VERSION",
        "CURRENT_DATABASE",
        "TO_REGCLASS",
    ]
)


def _judge(draft: _Draft, text: str) -> Statement:
    words = draft.words
    verb = _verb(words[0], words)
    sets_config = "SET_CONFIG" in draft.calls
    advisory = "advisory" in text.lower()
    timeouts = looks_at_timeouts(text)
    return Statement(
        verb,
        tuple(words[:8]),
        text,
        read_only=verb is Verb.QUERY and draft.calls <= _HARMLESS_CALLS,
        plain=verb in (Verb.QUERY, Verb.WRITE, Verb.CURSOR)
        and not (sets_config or advisory or timeouts),
        settings=_settings(text) if verb in (Verb.SET, Verb.SET_LOCAL) else (),
        sets_config=sets_config,
        temporary=_temporary(words, text) if verb is Verb.DDL else None,
        advisory=advisory,
        prepares=verb is Verb.PREPARE or (verb is Verb.DDL and "prepare" in text.lower()),
        cursor=_cursor(text) if verb is Verb.DECLARE else "",
        looks_at_timeouts=timeouts,
    )


def _cursor(text: str) -> str:
    named = [token for kind, token, _, _ in _tokens(text) if kind in ("word", "quoted")]
    return named[1].strip('"').lower() if len(named) > 1 else ""


def _verb(first: str, words: list[str]) -> Verb:
    second = words[1] if len(words) > 1 else ""
    if first in _QUERY_WORDS:
        return Verb.WRITE if _writes(words) else Verb.QUERY
    if first in _DDL_WORDS:
        return Verb.DDL
    if first == "SET":
        return _set_verb(second)
    if first == "PREPARE":
        return Verb.TWO_PHASE if second == "TRANSACTION" else Verb.PREPARE
    if first == "START":
        return Verb.BEGIN
    if first in ("COMMIT", "ROLLBACK") and second == "PREPARED":
        return Verb.TWO_PHASE
    if first == "COMMIT":
        return Verb.COMMIT
    if first == "ROLLBACK":
        return Verb.SAVEPOINT if "TO" in words[1:3] else Verb.ROLLBACK
    return _SIMPLE_VERBS.get(first, Verb.WRITE)


def _set_verb(second: str) -> Verb:
    return {
        "LOCAL": Verb.SET_LOCAL,
        "TRANSACTION": Verb.SET_TRANSACTION,
        "CONSTRAINTS": Verb.SET_CONSTRAINTS,
    }.get(second, Verb.SET)


def _writes(words: list[str]) -> bool:
    """Whether a query's words show a write: a data-modifying WITH, SELECT INTO, a row lock."""
    if not _WRITING_WORDS.isdisjoint(words):
        return True
    return any(word == "FOR" and after in _LOCKING for word, after in pairwise(words))


_SETTING: Final = re.compile(
    r"(?:SET|RESET)\s+(?:(?:LOCAL|SESSION)\s+(?!AUTHORIZATION|CHARACTERISTICS))?"
    r"(SESSION\s+\w+|TIME\s+ZONE|XML\s+OPTION|[\w.\"$]+)",
    re.IGNORECASE,
)
_DEFAULT_MODES: Final = (
    "default_transaction_isolation",
    "default_transaction_read_only",
    "default_transaction_deferrable",
)
_SETTING_SYNTAX: Final = {
    "all": (),
    "names": ("client_encoding",),
    "schema": ("search_path",),
    "session authorization": ("session_authorization", "role"),
    "session characteristics": _DEFAULT_MODES,
    "time zone": ("timezone",),
    "xml option": ("xmloption",),
}


def _settings(text: str) -> tuple[str, ...]:
    found = _SETTING.match(text)
    if not found:
        return ()
    name = " ".join(found.group(1).lower().replace('"', "").split())
    return _SETTING_SYNTAX.get(name, (name,))


_TEMPORARY: Final = re.compile(
    r"TEMP(?:ORARY)?\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?(?:pg_temp\s*\.\s*)?(\"[^\"]+\"|[\w$]+)",
    re.IGNORECASE,
)


def _temporary(words: list[str], text: str) -> tuple[str, str] | None:
    """Find the temporary table that is emptied or dropped at each commit."""
    for at in range(1, len(words) - 2):
        if words[at : at + 2] == ["ON", "COMMIT"] and words[at + 2] in ("DROP", "DELETE"):
            found = _TEMPORARY.search(text)
            return (found.group(1), words[at + 2]) if found else None
    return None


def declaration(name: str, query: str, *, holds: bool) -> Statement:
    """Give what a client sends that opens a server-side cursor for a query."""
    words = ("DECLARE", "HOLD") if holds else ("DECLARE",)
    return Statement(Verb.DECLARE, words, query, cursor=name.lower())
