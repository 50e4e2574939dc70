"""The options of the plugin: a table, and what command line, environment and ini say of it."""

from __future__ import annotations

from pathlib import Path
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any, Final

from ..connection_type import CONNECTION_TYPES
from ..errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .addresses.variables import Variable

__all__ = ["OPTIONS", "Option", "OptionError", "Options", "resolve"]

JUDGEMENTS: Final = ("off", "warn", "error")
ISOLATIONS: Final = ("auto", "rollback", "clone")
SEQUENCES: Final = ("count", "restart")
_LIBPQ: Final = {
    "PGHOST": "host",
    "PGPORT": "port",
    "PGUSER": "user",
    "PGPASSWORD": "password",
    "PGDATABASE": "dbname",
}
_YES: Final = frozenset({"1", "true", "yes", "on"})
_NO: Final = frozenset({"0", "false", "no", "off", ""})


class OptionError(PGMonkeyError):
    """An option is wrong, or contradicts another; pytest shows it as a usage error."""


# Plain classes: every run of pytest would wait for what makes the methods of a dataclass.


class Option:
    """One option: `--pgmonkey-NAME`, `PGMONKEY_NAME` and the ini key `pgmonkey_NAME`.

    `kind` is `string`, `path`, `flag`, `boolean`, `choice`, `names`, `lines`,
    `count` or `seconds`.
    """

    def __init__(
        self,
        name: str,
        default: Any,
        text: str,
        kind: str = "string",
        choices: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.key = name.replace("-", "_")
        self.default = default
        self.help = text
        self.kind = kind
        self.choices = choices
        self.flag = f"--pgmonkey-{name}"
        self.ini = f"pgmonkey_{self.key}"
        self.variable = self.ini.upper()


OPTIONS: Final = (
    Option("config", None, "YAML file of the server to test on", "path"),
    Option("resolve-env", False, "resolve ${VAR}, from_env and from_file in that file", "flag"),
    Option(
        "allow-sensitive-defaults",
        False,
        "allow ${VAR:-default} for passwords and the like",
        "flag",
    ),
    Option(
        "intercept",
        "auto",
        "lead the application's own handles to the test's database",
        "choice",
        ("auto", "true", "false"),
    ),
    Option(
        "wait-timeout",
        5.0,
        "seconds that a connection waits for another one's transaction",
        "seconds",
    ),
    Option("extensions", (), "extensions created before the schema", "names"),
    Option(
        "env",
        (),
        "NAME, or NAME = url | url:SCHEME | dsn | host | port | user | password | dbname: "
        "environment variable that leads the application to the tests",
        "lines",
    ),
    Option("map", (), "DBNAME = primary: another database name for the test's database", "lines"),
    Option(
        "source",
        "auto",
        "where the server comes from",
        "choice",
        ("auto", "config", "embedded", "container"),
    ),
    Option("image", None, "container image of the server"),
    Option("bindir", None, "directory of PostgreSQL server programs", "path"),
    Option("data-directory", None, "where a private server has its data, instead of RAM", "path"),
    Option(
        "schema",
        (),
        "SQL file, directory of SQL files, or module:function; may be given several times",
        "lines",
    ),
    Option(
        "database",
        "auto",
        "with a config: use the database it names, or scratch databases on its server",
        "choice",
        ("auto", "existing", "scratch"),
    ),
    Option("isolation", "auto", "how tests are isolated", "choice", ISOLATIONS),
    Option("confirm", False, "run a test that fails in rollback isolation in a clone, too", "flag"),
    Option(
        "timeline",
        "failed",
        "show a test's statements in its report",
        "choice",
        ("failed", "always", "never"),
    ),
    Option("timeline-params", True, "show their parameters there", "boolean"),
    Option(
        "n-plus-one",
        "off",
        "find the same statement run from the same place, one by one",
        "choice",
        JUDGEMENTS,
    ),
    Option("n-plus-one-threshold", 10, "how often it is too often", "count"),
    Option("durations", 0, "show so many slowest statements and tests at the end", "count"),
    Option(
        "leaks", "warn", "tell of connections that a test has not returned", "choice", JUDGEMENTS
    ),
    Option(
        "report", None, "write a page with the tests' statements, to be opened in a browser", "path"
    ),
    Option(
        "sequences",
        "count",
        "where each test finds sequences: they go on counting, or restart as the template has them",
        "choice",
        SEQUENCES,
    ),
    Option("types", ("native",), "types that pgmonkey_connection runs over", "names"),
    Option("keep", "never", "keep the database of a failed test", "choice", ("never", "failed")),
)


class Options:
    """What the options come to; `given` are the names that somebody set, and how."""

    config: Path | None
    resolve_env: bool
    allow_sensitive_defaults: bool
    intercept: str
    wait_timeout: float
    extensions: tuple[str, ...]
    env: tuple[Variable, ...]
    map: Mapping[str, str]
    source: str
    image: str | None
    bindir: Path | None
    data_directory: Path | None
    schema: tuple[str, ...]
    database: str
    isolation: str
    confirm: bool
    timeline: str
    timeline_params: bool
    n_plus_one: str
    n_plus_one_threshold: int
    durations: int
    leaks: str
    report: Path | None
    sequences: str
    types: tuple[str, ...]
    keep: str
    rootdir: Path
    given: Mapping[str, str]
    libpq: Mapping[str, str]
    """What libpq takes from variables that `env` overwrites, for a file that relies on them."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    @property
    def expects_existing(self) -> bool:
        """Whether tests run in a database as it is, unless a fixture has a schema for them."""
        new = self.database == "scratch" or self.schema or self.extensions
        return self.config is not None and not new


def resolve(
    on_command_line: Callable[[Option], Any],
    in_ini: Callable[[Option], Any],
    environ: Mapping[str, str],
    *,
    rootdir: Path,
    called_from: Path,
) -> Options:
    """Decide every option: the command line beats the environment, which beats the ini file.

    Paths of the ini file start at `rootdir`, others where pytest was called. Raises OptionError.
    """
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for option in OPTIONS:
        values[option.key] = option.default
        word = environ.get(option.variable)
        for raw, origin, base in (
            (on_command_line(option), option.flag, called_from),
            ([word] if word and option.kind == "lines" else word, option.variable, called_from),
            (in_ini(option), option.ini, rootdir),
        ):
            if raw not in (None, "", []):
                given[option.name] = origin
                values[option.key] = _convert(option, raw, origin, base)
                break
    values["map"] = _mapping(values["map"], given.get("map", ""))
    values["env"] = _variables(values["env"], given.get("env", ""))
    values["types"] = judge_types(values["types"], given.get("types", ""))
    overwritten = {variable.name for variable in values["env"]}
    libpq = {
        _LIBPQ[name]: environ[name] for name in overwritten & _LIBPQ.keys() if environ.get(name)
    }
    options = Options(**values, rootdir=rootdir, given=given, libpq=libpq)
    _contradictions(options)
    return options


def _convert(option: Option, raw: Any, origin: str, base: Path) -> Any:
    if option.kind == "path":
        return base / Path(raw).expanduser()
    if option.kind in ("flag", "boolean"):
        return _boolean(raw, origin)
    if option.kind == "seconds":
        return _seconds(raw, origin)
    if option.kind == "count":
        return _count(raw, origin)
    if option.kind == "choice":
        return _choice(option, str(raw), origin)
    if option.kind == "names":
        text = raw if isinstance(raw, str) else " ".join(raw)
        return tuple(text.replace(",", " ").split())
    if option.kind == "lines":
        lines = tuple(line.strip() for line in raw if line.strip())
        return tuple(_anchored(line, base) for line in lines) if option.name == "schema" else lines
    return str(raw)


def _anchored(step: str, base: Path) -> str:
    """Make the path of a schema step absolute; `module:function` stays as it is."""
    return step if is_function(step) else str(base / Path(step).expanduser())


def is_function(step: str) -> bool:
    """Whether a schema step names a function: `package.module:function`."""
    module, colon, name = step.partition(":")
    return bool(colon) and name.isidentifier() and module.replace(".", "_").isidentifier()


def _boolean(raw: Any, origin: str) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word in _YES or word in _NO:
        return word in _YES
    raise OptionError(f"{origin}: {raw!r} is neither true nor false")


def _seconds(raw: Any, origin: str) -> float:
    try:
        seconds = float(raw)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= TIMEOUT_MAX:
        raise OptionError(f"{origin}: {raw!r} is not a number of seconds above 0")
    return seconds


def _count(raw: Any, origin: str) -> int:
    word = str(raw).strip()
    if not word.isdecimal() or int(word) < 1:
        raise OptionError(f"{origin}: {raw!r} is not a whole number above 0")
    return int(word)


def _choice(option: Option, word: str, origin: str) -> str:
    if word in option.choices:
        return word
    raise OptionError(f"{origin}: {word!r} is not one of {', '.join(option.choices)}")


def _mapping(lines: Iterable[str], origin: str) -> dict[str, str]:
    mapping = {}
    for line in lines:
        name, equals, target = (part.strip() for part in line.partition("="))
        if not equals or not name or target != "primary":
            raise OptionError(f"{origin}: {line!r} must read DBNAME = primary")
        mapping[name] = target
    return mapping


def _variables(lines: Iterable[str], origin: str) -> tuple[Variable, ...]:
    if not lines:
        return ()  # nearly every run: nothing is imported for it
    from .addresses.variables import PARTS, read_variable

    found = []
    for line in lines:
        variable = read_variable(line)
        if variable is None:
            parts = ", ".join(PARTS)
            raise OptionError(
                f"{origin}: {line!r} must read NAME, NAME = url:SCHEME, or NAME = one of {parts}"
            )
        found.append(variable)
    return tuple(found)


def judge_types(names: tuple[str, ...], origin: str) -> tuple[str, ...]:
    """Check connection type names, among which `native` and `all` stand alone."""
    allowed = (*CONNECTION_TYPES, "native", "all")
    if not names:
        raise OptionError(f"{origin}: names no type; there are {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise OptionError(f"{origin}: {name!r} is not one of {', '.join(allowed)}")
    if len(names) > 1 and not set(names) <= set(CONNECTION_TYPES):
        raise OptionError(f"{origin}: 'native' and 'all' cannot be combined with other types")
    return tuple(dict.fromkeys(names))


def _contradictions(options: Options) -> None:
    given = options.given
    if options.config is not None and options.source in ("embedded", "container"):
        raise OptionError(
            f"{given['config']} names a server, and {given['source']} says {options.source}: "
            "give one of them"
        )
    if options.source == "config" and options.config is None:
        raise OptionError(f"{given['source']} is config: name the file with --pgmonkey-config")
    for name in given.keys() & {"bindir", "data-directory"}:
        if options.config or options.source == "container":
            raise OptionError(f"{given[name]} is for an embedded server, and there is none here")
        if options.image is not None:
            raise OptionError(
                f"{given[name]} is for an embedded server, and {given['image']} for a container: "
                "give one of them"
            )
    if options.image is not None and (options.config or options.source == "embedded"):
        raise OptionError(f"{given['image']} is for a container, and there is none here")
    if options.database != "auto" and options.config is None:
        raise OptionError(f"{given['database']} is for a server that --pgmonkey-config names")
    if options.schema or options.extensions:
        refuse_existing(options)


def refuse_existing(options: Options) -> None:
    """Raise OptionError where nothing can be loaded into the tests' database."""
    if options.database == "existing":
        raise OptionError(
            f"{options.given['database']} is existing: nothing is ever committed in it, so "
            "schema and extensions cannot be loaded; use scratch databases"
        )
