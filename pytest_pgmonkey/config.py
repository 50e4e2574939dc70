"""Configurations: the only place that reads YAML, and the judge of what it says.

`load_config` gives a file's content as a dictionary; `read_spec` and `connection_spec` give what
one connection type needs of it, in the form that libpq, `set_config()` and psycopg_pool take.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import yaml

from .connection_type import CONNECTION_TYPES, ConnectionType
from .errors import ConfigError
from .judge import TLS_FILES, Judge, expanded, judge_name, kind_of, nearest, shown
from .secrets import interpolate, is_in_a_file, is_reference, is_sensitive, redact_text

SECTIONS = (
    "connection_settings",
    "sync_settings",
    "async_settings",
    "pool_settings",
    "async_pool_settings",
)
TOP_LEVEL = ("connection_type", *SECTIONS)


@dataclass(frozen=True, slots=True, repr=False)
class FileValue:
    """What a secret file holds for one of libpq's keywords; equal to what it holds later."""

    path: str
    text: str = field(compare=False)
    #: Gives the text that the file holds now; raises ConfigError.
    read: Callable[[], str] = field(compare=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, repr=False)
class ConnectionSpec:
    """All that one connection type needs; equal specs may share connections."""

    type: ConnectionType
    #: libpq's keywords and their values, sorted.
    conninfo: tuple[tuple[str, str | FileValue], ...]
    autocommit: bool
    #: Session settings in the order of the file, values as `set_config()` takes them.
    settings: tuple[tuple[str, str], ...] = ()
    #: Arguments of psycopg_pool's constructor; empty for the types without a pool.
    pool: tuple[tuple[str, Any], ...] = ()
    check_on_checkout: bool = False
    #: The file it comes from, `None` for a dictionary.
    origin: str | None = field(default=None, compare=False)
    #: The whole configuration that it was taken from.
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def conninfo_dict(self) -> dict[str, str]:
        return {key: str(value) for key, value in self.conninfo}

    def read_conninfo(self) -> dict[str, str]:
        """Give libpq's keywords with the secrets that their files hold now; raises ConfigError."""
        return {
            key: value.read() if isinstance(value, FileValue) else value
            for key, value in self.conninfo
        }

    @property
    def dbname(self) -> str | None:
        """The database, as libpq resolves it; `None` where the environment decides."""
        conninfo = self.conninfo_dict
        if "service" in conninfo or "PGSERVICE" in os.environ:
            return conninfo.get("dbname")
        name = conninfo.get("dbname") or os.environ.get("PGDATABASE")
        return name or conninfo.get("user") or os.environ.get("PGUSER")

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values that no message may show; for `redact_text`."""
        public = {value for key, value in self.conninfo if key in ("host", "user", "dbname")}
        given = dict(self.pool).get("kwargs", {})
        items = given.items() if isinstance(given, Mapping) else ()
        values = (*self.conninfo, *self.settings, *items)
        return tuple(
            str(value)
            for key, value in values
            if is_sensitive(key) and key not in TLS_FILES and value not in public
        )

    def describe(self, name: str) -> str:
        """Say for a repr what it connects to, under a name; without secrets."""
        shown = [
            f"{key}={self.conninfo_dict[key]!r}"
            for key in ("host", "port", "dbname", "user")
            if key in self.conninfo_dict
        ]
        return redact_text(" ".join([name, str(self.type), *shown]), self.secrets)

    def __repr__(self) -> str:
        return f"<{self.describe('ConnectionSpec')} origin={self.origin!r}>"


# --- entrances ---


def load_config(
    path: str | os.PathLike[str],
    resolve_env: bool = False,
    allow_sensitive_defaults: bool = False,
    strict: bool = False,
) -> dict[str, Any]:
    """Read a configuration file, check it, and give its sections.

    `resolve_env` replaces `${VAR}`, `from_env` and `from_file`; without it they stay as they are.
    With it, `allow_sensitive_defaults` lets `${VAR:-default}` stand for passwords, too, and
    `strict` refuses variables that are set but empty.

    Raises `ConfigError`, with the file and the key, where something is wrong, and
    `EnvInterpolationError` where a variable or a secret file is missing.
    """
    origin = os.fspath(path)
    options = (resolve_env, allow_sensitive_defaults, strict)
    config = prepare_config(read_mapping(path), origin, *options)
    judged = config if resolve_env else _without_references(config)
    type_ = _connection_type(None, judged, origin)
    Judge(judged, origin).connection_settings()
    Judge(judged, origin).session_settings(type_)
    Judge(judged, origin).pool_settings(type_)
    return config


def prepare_config(
    config: Mapping[str, Any],
    origin: str | None = None,
    resolve_env: bool = False,
    allow_sensitive_defaults: bool = False,
    strict: bool = False,
) -> dict[str, Any]:
    """Unwrap and interpolate a configuration and judge its outline: the sections and their names.

    What the sections hold is judged by `connection_spec`, for the type that is asked for.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("the configuration is not a mapping of sections", origin)
    config = _unwrapped(config, origin)
    if resolve_env:
        config = interpolate(config, os.environ, allow_sensitive_defaults, strict, origin)
    for name in config:
        judge_name(name, "", TOP_LEVEL, origin, "section")
    if config.get("connection_settings") is None:
        state = "empty" if "connection_settings" in config else "missing"
        raise ConfigError(f"section connection_settings is {state}", origin)
    return {name: _section(name, value, origin) for name, value in config.items()}


def read_spec(
    path: str | os.PathLike[str],
    connection_type: str | ConnectionType | None = None,
    resolve_env: bool = False,
    allow_sensitive_defaults: bool = False,
    strict: bool = False,
) -> ConnectionSpec:
    """Read a file for one connection type; the sections of the other types are not judged."""
    origin = os.fspath(path)
    options = (resolve_env, allow_sensitive_defaults, strict)
    stamp = _stamp(origin)
    known = _known_file(origin, stamp) if stamp else _Known(read_mapping(origin), origin)
    return known.spec(connection_type, *options)


def dsn_spec(dsn: str, connection_type: str | ConnectionType | None = None) -> ConnectionSpec:
    """Judge a DSN in the place of a configuration."""
    return _known_dsn(dsn).spec(connection_type)


def resolved_spec(
    config: Mapping[str, Any],
    connection_type: str | ConnectionType | None = None,
    resolve_env: bool = False,
    allow_sensitive_defaults: bool = False,
    strict: bool = False,
    *,
    origin: str | None = None,
) -> ConnectionSpec:
    """Do as `connection_spec` for a configuration that may have references.

    Passwords that are read from files are read anew for each connection, by `read_conninfo`.
    """
    options = (allow_sensitive_defaults, strict, origin)
    prepared = prepare_config(config, origin, resolve_env, allow_sensitive_defaults, strict)
    spec = connection_spec(prepared, connection_type, origin=origin)
    if not resolve_env:
        return spec
    sections = config.get("postgresql", config)
    files = {
        name: value
        for name, value in sections.get("connection_settings", {}).items()
        if is_in_a_file(value)
    }
    if not files:
        return spec
    return replace(spec, conninfo=tuple(_with_files(spec, files, options)))


def _with_files(
    spec: ConnectionSpec, files: Mapping[str, Any], options: tuple[bool, bool, str | None]
) -> Iterator[tuple[str, str | FileValue]]:
    named = spec.config["connection_settings"]
    for keyword, text in spec.conninfo_dict.items():
        # What stands beside a DSN wins over its parts.
        name = keyword if named.get(keyword) not in (None, "") else "dsn"
        if name in files and is_sensitive(keyword) and keyword not in TLS_FILES:
            read = partial(_read_again, name, files[name], keyword, options)
            yield keyword, FileValue(files[name]["from_file"], text, read)
        else:
            yield keyword, text


def _read_again(
    name: str, reference: Any, keyword: str, options: tuple[bool, bool, str | None]
) -> str:
    config = {"connection_settings": {name: reference}}
    read = interpolate(config, os.environ, *options)
    return Judge(read, options[-1]).connection_settings()[0].get(keyword, "")


def connection_spec(
    config: Mapping[str, Any],
    connection_type: str | ConnectionType | None = None,
    *,
    origin: str | None = None,
) -> ConnectionSpec:
    """Judge what one type uses of a configuration; without a type, the one that it names."""
    config = prepare_config(config, origin=origin)
    type_ = _connection_type(connection_type, config, origin)
    judge = Judge(config, origin)
    conninfo, autocommit = judge.connection_settings()
    judge.tls_files(conninfo)
    pool, check_on_checkout = judge.pool_settings(type_)
    return ConnectionSpec(
        type=type_,
        conninfo=tuple(sorted(conninfo.items())),
        autocommit=autocommit,
        settings=judge.session_settings(type_),
        pool=pool,
        check_on_checkout=check_on_checkout,
        origin=origin,
        config=config,
    )


# --- what was read before ---

#: How many files, and how many DSNs.
_KNOWN = 32
#: Nanoseconds in which two changes may leave a file with the same times; FAT's are the coarsest.
_UNSETTLED = 2_000_000_000


class _Known:
    """A configuration that was read, with the specs that nothing but its text decides."""

    def __init__(self, config: Mapping[str, Any], origin: str | None = None) -> None:
        self._config = config
        self._origin = origin
        self._is_fixed = _is_fixed(config)
        #: Each with its conninfo where that names files, which must be there each time.
        self._specs: dict[str | None, tuple[ConnectionSpec, dict[str, str] | None]] = {}

    def spec(self, connection_type: str | ConnectionType | None, *options: bool) -> ConnectionSpec:
        """Do as `resolved_spec`; what may have changed since is resolved and judged again."""
        name = connection_type if isinstance(connection_type, str) else None
        known = self._specs.get(name) if name is connection_type else None
        if known is not None:
            if known[1] is not None:
                Judge({}, self._origin).tls_files(known[1])
            return known[0]
        # A copy: its lists are in the reach of those who get the spec.
        config = deepcopy(self._config)
        spec = resolved_spec(config, connection_type, *options, origin=self._origin)
        if self._is_fixed:
            conninfo = spec.conninfo_dict
            self._specs[name] = spec, None if conninfo.keys().isdisjoint(TLS_FILES) else conninfo
        return spec


def _is_fixed(value: Any) -> bool:
    """Whether a value means the same each time: no reference, no home directory, no warning."""
    if isinstance(value, str):
        return "~" not in value and not is_reference(value)
    if isinstance(value, Mapping):
        is_plain = not is_reference(value) and "postgresql" not in value
        return is_plain and all(map(_is_fixed, value.values()))
    return not isinstance(value, list) or all(map(_is_fixed, value))


def _stamp(origin: str) -> tuple[int, ...] | None:
    """Give what changes with a file's content; `None` where only reading it would tell."""
    try:
        status = os.stat(expanded(origin))
    except (OSError, ValueError):
        return None
    is_settled = time.time_ns() - status.st_mtime_ns > _UNSETTLED
    if not is_settled or not stat.S_ISREG(status.st_mode):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# The stamp is a part of the cache's key and nothing else.
@lru_cache(maxsize=_KNOWN)
def _known_file(origin: str, stamp: tuple[int, ...]) -> _Known:  # noqa: ARG001
    return _Known(read_mapping(origin), origin)


@lru_cache(maxsize=_KNOWN)
def _known_dsn(dsn: str) -> _Known:
    return _Known({"connection_settings": {"dsn": dsn}})


def _without_references(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what cannot be judged before it is interpolated."""
    return {
        name: {key: value for key, value in section.items() if not is_reference(value)}
        if isinstance(section, dict)
        else section
        for name, section in config.items()
        if not is_reference(section)
    }


# --- outline ---


def _unwrapped(config: Mapping[str, Any], origin: str | None) -> Mapping[str, Any]:
    if "postgresql" not in config:
        return config
    inner = config["postgresql"]
    if not isinstance(inner, Mapping):
        raise ConfigError("is not a mapping of sections", origin, "postgresql")
    warnings.warn(
        f"{origin or 'configuration'}: the wrapper 'postgresql:' is deprecated; "
        "move the sections beneath it to the top level",
        DeprecationWarning,
        stacklevel=_users_stacklevel(),
    )
    return {**{name: value for name, value in config.items() if name != "postgresql"}, **inner}


def _users_stacklevel() -> int:
    """Find the first caller outside this package, counted as `warnings.warn` counts."""
    package = __name__.partition(".")[0]
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level


def _section(name: str, value: Any, origin: str | None) -> Any:
    if name not in SECTIONS:
        return value
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"is {kind_of(value)}, not a mapping", origin, name)
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"a name in it is {kind_of(key)}", origin, name, "put it in quotes")
    return dict(value)


def _connection_type(
    asked: str | ConnectionType | None, config: Mapping[str, Any], origin: str | None
) -> ConnectionType:
    named = asked if asked is not None else config.get("connection_type") or ConnectionType.NORMAL
    try:
        return ConnectionType(named)
    except ValueError:
        pass
    hint = nearest(named, CONNECTION_TYPES) or f"one of {', '.join(CONNECTION_TYPES)}"
    if asked is not None:
        raise ConfigError(f"unknown connection type {shown(named)}", hint=hint)
    raise ConfigError(f"unknown connection type {shown(named)}", origin, "connection_type", hint)


# --- YAML ---


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which a scalar is a number only where the number is spelt like it.

    So `password: 0123` stays the string that was written, and dates and `1:30` are strings.
    """


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", None),
    ("int", r"-?[1-9][0-9]{0,17}|0", None),
    ("float", r"-?(?:0|[1-9][0-9]{0,7})\.(?:0|[0-9]{0,3}[1-9])", None),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"^(?:{_pattern})$"),
        _first or list("yYnNtTfFoO" if _tag == "bool" else "-0123456789"),
    )

# The parser's own words where they are fixed; others may quote the file's text.
_SAFE_PROBLEM = "did not find expected "
_SAFE_PROBLEMS = frozenset(
    {
        "could not find expected ':'",
        "found character that cannot start any token",
        "found unexpected end of stream",
        "found unknown escape character",
        "mapping values are not allowed in this context",
    }
)
_MAX_NODES = 20_000


def read_mapping(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a YAML file that holds a mapping; nothing in it is judged yet."""
    origin = os.fspath(path)
    try:
        with open(expanded(origin), "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its own text shows bytes of the file.
        raise ConfigError(f"is not UTF-8 (at byte {error.start})", origin) from None
    except (OSError, ValueError) as error:
        if redact_text(origin) != origin or "://" in origin:
            problem, hint = "a connection string is no file", "use get_database_connection_from_dsn"
            raise ConfigError(problem, hint=hint) from None
        reason = getattr(error, "strerror", None) or "bad path"
        raise ConfigError(f"cannot be read: {reason}", origin) from None
    config = _parse(text, origin)
    if config is None:
        raise ConfigError("is empty", origin, hint="`pgmonkey pgconfig create` writes a template")
    if not isinstance(config, Mapping):
        raise ConfigError(f"is {kind_of(config)}, not a mapping of sections", origin)
    return config


def _parse(text: str, origin: str) -> Any:
    # The parser's exceptions carry the text around the error: they end here, unchained.
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _judge_nodes(node, origin)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise  # It is a ValueError, which is caught below.
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"malformed YAML{_position(mark)}"
        said = error.problem or ""
        if said in _SAFE_PROBLEMS or said.startswith(_SAFE_PROBLEM):
            problem += f": {said}"
        elif said.startswith("found character '\\t'"):
            problem += ": indented with a tab"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"malformed YAML at line {line}: a character that YAML does not allow"
    except RecursionError:
        problem = "malformed YAML: nested too deeply"
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        # PyYAML lets a constructor's own error out.
        problem = "malformed YAML: a value cannot be read as what its tag says"
    raise ConfigError(problem, origin)


def _position(mark: Any) -> str:
    return f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _judge_nodes(root: yaml.Node, origin: str) -> None:
    """Refuse duplicate keys, which YAML loses in silence, and aliases that never end."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in open_:
            raise ConfigError(f"an alias holds itself{_position(node.start_mark)}", origin)
        if id(node) not in sizes:
            open_.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _judge_keys(node, origin)
                sizes[id(node)] = 1 + sum(size(key) + size(value) for key, value in node.value)
            else:
                sizes[id(node)] = 1 + sum(map(size, node.value))
            open_.discard(id(node))
        return sizes[id(node)]

    if size(root) > _MAX_NODES:
        raise ConfigError(f"holds more than {_MAX_NODES} values", origin)


def _judge_keys(node: yaml.MappingNode, origin: str) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if (key.tag, key.value) in seen:
            raise ConfigError(
                f"duplicate key {shown(key.value)}{_position(key.start_mark)}", origin
            )
        seen.add((key.tag, key.value))
