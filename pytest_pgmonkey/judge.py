"""What the sections of a configuration may hold, and the form in which it is passed on.

`Judge` takes one section after the other and gives libpq's, `set_config()`'s or psycopg_pool's
arguments, or a `ConfigError` that names the key.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ConfigError, require_libpq
from .secrets import is_reference, redact_text

if TYPE_CHECKING:
    from .connection_type import ConnectionType

# --- names and kinds ---

_OTHER_NAMES = {
    "connection": "connection_settings",
    "conninfo": "dsn",
    "database": "dbname",
    "database_url": "dsn",
    "db": "dbname",
    "hostname": "host",
    "pass": "password",
    "passwd": "password",
    "server": "host",
    "settings": "connection_settings",
    "ssl": "sslmode",
    "timeout": "connect_timeout",
    "uri": "dsn",
    "url": "dsn",
    "username": "user",
}


def judge_name(
    name: object, section: str, known: Iterable[str], origin: str | None, kind: str = "key"
) -> None:
    known = tuple(known)
    if name in known:
        return
    problem, hint = f"unknown {kind} {shown(name)}", nearest(name, known)
    if not isinstance(name, str):
        problem, hint = f"a {kind} name is {kind_of(name)}", "put it in quotes"
    raise ConfigError(problem, origin, section or None, hint)


def nearest(name: object, known: Iterable[str]) -> str | None:
    if not isinstance(name, str):
        return None
    known = tuple(known)
    lower = name.strip().lower().replace("-", "_")
    near = get_close_matches(lower, known, n=1, cutoff=0.6)
    other = _OTHER_NAMES.get(lower)
    if other in known:
        near = [str(other)]
    return f"did you mean {near[0]!r}?" if near else None


def shown(name: object) -> str:
    if not isinstance(name, str):
        return kind_of(name)
    # A forgotten blank after a colon makes a value a part of the name.
    text = redact_text(name)
    return repr(text if len(text) <= 40 and ":" not in text else text[:20].split(":")[0] + "...")


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"),
    (str, "a string"),
    ((int, float), "a number"),
    ((list, tuple), "a list"),
    (Mapping, "a mapping"),
)


def kind_of(value: object) -> str:
    if value is None:
        return "empty"
    found = (kind for type_, kind in _KINDS if isinstance(value, type_))
    return next(found, f"of type {type(value).__name__}")


# --- values ---

_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_SETTING_NAME = re.compile(r"[^\W\d][\w$]*(\.[^\W\d][\w$]*)*")

_SQLALCHEMY_URL = re.compile(r"(postgres(?:ql)?)(\+\w+)://")
#: The name in libpq's error. It may be a piece of a password that is not escaped.
_UNKNOWN_KEYWORD = re.compile(r'(?:connection option|query parameter:) "(\w+)"')

_LIBPQ_INTEGERS = frozenset(
    {"connect_timeout", "keepalives_count", "keepalives_idle", "keepalives_interval"}
    | {"tcp_user_timeout"}
)
_LIBPQ_BOOLEANS = frozenset({"gssdelegation", "keepalives", "sslcompression", "sslsni"})
_LIBPQ_PATHS = frozenset(
    {"host", "passfile", "servicefile", "sslcert", "sslcrl", "sslcrldir", "sslkey"}
    | {"sslkeylogfile", "sslrootcert"}
)
TLS_FILES = ("sslrootcert", "sslcert", "sslkey")


@lru_cache(maxsize=1)
def _libpq_keywords() -> frozenset[str]:
    try:
        from psycopg.pq import Conninfo
    except ImportError:
        require_libpq()
        raise
    return frozenset(option.keyword.decode() for option in Conninfo.get_defaults())


class _Frozen(dict[str, Any]):
    """Keyword arguments inside a hashable spec."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self))


@dataclass(frozen=True)
class Judge:
    config: Mapping[str, Any]
    origin: str | None

    def connection_settings(self) -> tuple[dict[str, str], bool]:
        section = "connection_settings"
        known = _libpq_keywords() | {"autocommit", "dsn"}
        # As in psycopg.connect(dsn, **keywords): what is named beside a DSN wins over its parts.
        conninfo = self.dsn_parts(self.config[section].get("dsn"), f"{section}.dsn")
        autocommit = False
        for name, value in self.config[section].items():
            judge_name(name, section, known, self.origin)
            if name == "dsn" or value is None or value == "":
                continue
            key = f"{section}.{name}"
            if name == "autocommit":
                autocommit = self.boolean(value, key)
            else:
                conninfo[name] = self.libpq_value(name, value, key)
        return conninfo, autocommit

    def dsn_parts(self, dsn: Any, key: str) -> dict[str, str]:
        """Take a connection string apart; no error shows any of it, as it may hold a password."""
        if dsn is None or dsn == "":
            return {}
        parts = self.parsed(self.text(dsn, key), key)
        return {
            name: self.libpq_value(name, str(value), f"{key}.{name}")
            for name, value in parts.items()
            if value != ""
        }

    def parsed(self, dsn: str, key: str) -> dict[str, Any]:
        from psycopg import ProgrammingError
        from psycopg.conninfo import conninfo_to_dict

        if driver := _SQLALCHEMY_URL.match(dsn):
            hint = f"write {driver[1]}:// in place of {driver[1]}{driver[2]}://"
            self.wrong("is a URL of SQLAlchemy", key, hint)
        if "\0" in dsn:
            self.wrong("holds a zero byte", key)
        try:
            return conninfo_to_dict(dsn)
        except (ProgrammingError, UnicodeError) as error:
            unknown = _UNKNOWN_KEYWORD.search(str(error))
        if unknown:
            near = nearest(unknown[1], _libpq_keywords())
            self.wrong("has a parameter that libpq does not know", key, near)
        hint = self.unresolved(dsn) or "write postgresql://user@host/dbname or host=... dbname=..."
        return self.wrong("cannot be read by libpq", key, hint)

    def libpq_value(self, name: str, value: Any, key: str) -> str:
        if name == "port":
            return self.port(value, key)
        if name in _LIBPQ_INTEGERS:
            return str(self.integer(value, key, -(2**31), 2**31 - 1))
        if name in _LIBPQ_BOOLEANS:
            return "1" if self.boolean(value, key) else "0"
        if name in _LIBPQ_PATHS and isinstance(value, os.PathLike):
            value = os.fspath(value)
        text = self.text(value, key)
        if "\0" in text:
            self.wrong("holds a zero byte", key)
        return expanded(text) if name in _LIBPQ_PATHS else text

    def text(self, value: Any, key: str) -> str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        self.refuse_reference(value, key)
        kind = "None" if value is None else kind_of(value)
        hint = "put it in quotes" if isinstance(value, bool) else None
        return self.wrong(f"must be a string, not {kind}", key, hint)

    def boolean(self, value: Any, key: str) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str | int) and str(value).strip().lower() in _BOOLEANS:
            return _BOOLEANS[str(value).strip().lower()]
        return self.wrong("must be true or false", key, self.unresolved(value))

    def integer(self, value: Any, key: str, low: int, high: int | None = None) -> int:
        number = value
        if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
            number = int(value)
        if not isinstance(number, int) or isinstance(number, bool):
            self.wrong("must be an integer", key, self.unresolved(value))
        if number < low or (high is not None and number > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            self.wrong(f"must be {bounds}", key)
        return int(number)

    def number(self, value: Any, key: str, low: float, *, above: bool = False) -> float:
        number: Any = value
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                number = None
        if not isinstance(number, int | float) or isinstance(number, bool):
            self.wrong("must be a number", key, self.unresolved(value))
        if not math.isfinite(number) or number < low or (above and number == low):
            self.wrong(f"must be {'above' if above else 'at least'} {low:g}", key)
        return number if isinstance(value, int) else float(number)

    def port(self, value: Any, key: str) -> str:
        # One per host, libpq's default where an item is empty.
        parts = value.split(",") if isinstance(value, str) and "," in value else [value]
        return ",".join(
            ""
            if isinstance(part, str) and not part.strip()
            else str(self.integer(part, key, 1, 65535))
            for part in parts
        )

    def refuse_reference(self, value: Any, key: str) -> None:
        if is_reference(value):
            self.wrong("refers to a secret", key, self.unresolved(value))

    def unresolved(self, value: Any) -> str | None:
        return "interpolation is off: pass resolve_env=True" if is_reference(value) else None

    def wrong(self, problem: str, key: str, hint: str | None = None) -> NoReturn:
        raise ConfigError(problem, self.origin, key, hint)

    # --- files of TLS ---

    def tls_files(self, conninfo: Mapping[str, str]) -> None:
        """Say which file is not there; libpq goes without an absent certificate in silence."""
        if conninfo.get("sslmode") == "disable":
            return
        for name in TLS_FILES:
            path = conninfo.get(name)
            if not path or (name == "sslrootcert" and path == "system"):
                continue
            try:
                with open(path, "rb"):  # half the cost of Path.open, on every call
                    pass
            except OSError as error:
                # A key may be in a hardware engine: "engine:key".
                if not (name == "sslkey" and ":" in path and isinstance(error, FileNotFoundError)):
                    problem = f"cannot read the file {path}: {error.strerror}"
                    raise ConfigError(problem, self.origin, f"connection_settings.{name}") from None

    # --- session settings ---

    def session_settings(self, type_: ConnectionType) -> tuple[tuple[str, str], ...]:
        section = type_.settings_section
        settings = self.config.get(section, {})
        for name in settings:
            if not _SETTING_NAME.fullmatch(name):
                self.wrong(f"{shown(name)} cannot be the name of a setting", section)
        return tuple(
            (name, self.setting_value(value, f"{section}.{name}"))
            for name, value in settings.items()
        )

    def setting_value(self, value: Any, key: str) -> str:
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, int | float | str):
            return str(value)
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return ", ".join(_identifier(item) for item in value)
        self.refuse_reference(value, key)
        return self.wrong("must be a string, a number, a boolean or a list of strings", key)

    # --- pools ---

    def pool_settings(self, type_: ConnectionType) -> tuple[tuple[tuple[str, Any], ...], bool]:
        section = type_.pool_section
        if section is None:
            return (), False
        arguments: dict[str, Any] = {}
        for name, value in self.config.get(section, {}).items():
            if name in _POOL_REFUSED:
                self.wrong("is not taken from here", f"{section}.{name}", _POOL_REFUSED[name])
            judge_name(name, section, _POOL_RULES, self.origin)
            if value is not None and not (value == "" and name != "name"):
                arguments[name] = _POOL_RULES[name](self, value, f"{section}.{name}")
        arguments.pop("open", None)
        check_on_checkout = arguments.pop("check_on_checkout", False)
        if check_on_checkout and "check" in arguments:
            self.wrong("excludes check_on_checkout", f"{section}.check")
        # max_size alone, below psycopg_pool's default of 4 for min_size, is no contradiction.
        if arguments.get("max_size", 4) in (1, 2, 3):
            arguments.setdefault("min_size", arguments["max_size"])
        smallest = arguments.get("min_size", 4)
        largest = arguments.get("max_size", smallest)
        if smallest > largest:
            self.wrong(f"min_size ({smallest}) is above max_size ({largest})", section)
        if largest == 0:
            self.wrong("min_size 0 needs a max_size", section)
        return tuple(sorted(arguments.items())), check_on_checkout

    def callback(self, value: Any, key: str) -> Any:
        if not callable(value):
            self.wrong("must be a function, which only a dictionary can hold", key)
        return value

    def conninfo(self, value: Any, key: str) -> Any:
        if not callable(value):
            self.wrong("must be a function", key, "write a DSN as connection_settings.dsn")
        return value

    def keywords(self, value: Any, key: str) -> Any:
        if callable(value):
            return value
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            self.wrong("must be a mapping of psycopg.connect()'s arguments", key)
        return _Frozen(value)

    def plain_string(self, value: Any, key: str) -> str:
        return value if isinstance(value, str) else self.wrong("must be a string", key)


def refuse_connection_strings(conninfo: Mapping[str, str], origin: str | None) -> None:
    """Refuse to connect with a whole connection string in the place of a name.

    libpq takes it for the name, and the server's error repeats it, password included.
    """
    for name in ("dbname", "host", "hostaddr", "user"):
        value = conninfo.get(name, "")
        if "://" in value or redact_text(value) != value:
            raise ConfigError(
                "holds a whole connection string",
                origin,
                f"connection_settings.{name}",
                "write it as the key dsn, or its parts as keys of their own",
            )


_Rule = Callable[[Judge, Any, str], Any]

# psycopg_pool's constructor, and ours on top.
_POOL_RULES: dict[str, _Rule] = {
    "min_size": lambda judge, value, key: judge.integer(value, key, 0),
    "max_size": lambda judge, value, key: judge.integer(value, key, 1),
    "timeout": lambda judge, value, key: judge.number(value, key, 0, above=True),
    "max_waiting": lambda judge, value, key: judge.integer(value, key, 0),
    "max_lifetime": lambda judge, value, key: judge.number(value, key, 0, above=True),
    "max_idle": lambda judge, value, key: judge.number(value, key, 0, above=True),
    "reconnect_timeout": lambda judge, value, key: judge.number(value, key, 0),
    "num_workers": lambda judge, value, key: judge.integer(value, key, 1),
    "name": Judge.plain_string,
    "close_returns": Judge.boolean,
    "open": Judge.boolean,
    "conninfo": Judge.conninfo,
    "kwargs": Judge.keywords,
    "check": Judge.callback,
    "reset": Judge.callback,
    "reconnect_failed": Judge.callback,
    "check_on_checkout": Judge.boolean,
}
_POOL_REFUSED = {
    "configure": "give it to PGConnectionManager(configure=..., aconfigure=...)",
    "connection_class": "connections are psycopg's own",
}


def expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~") else path


def _identifier(name: str) -> str:
    if re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        return name
    return '"{}"'.format(name.replace('"', '""'))
