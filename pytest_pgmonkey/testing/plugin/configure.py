"""The options of a run, and the interception of the application's handles."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from ... import sources
from ..interception import Interception
from ..options import OPTIONS as TABLE
from ..options import Option, OptionError, Options, resolve
from . import internals

if TYPE_CHECKING:
    from collections.abc import Iterable

OPTIONS: Final = pytest.StashKey[Options]()
INTERCEPTION: Final = pytest.StashKey[Interception]()
_SHAPES: Final[dict[str, dict[str, str]]] = {
    "flag": {"action": "store_true"},
    "lines": {"action": "append", "metavar": "X"},
}
_NATIVE: Final[dict[str, type]] = {"flag": bool, "boolean": bool, "count": int, "seconds": float}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pgmonkey", "PostgreSQL databases for tests (pytest-pgmonkey)")
    for option in TABLE:
        dest = f"{option.ini}_option"
        shape = _SHAPES.get(option.kind, {"metavar": "X"})
        group.addoption(option.flag, dest=dest, default=None, help=_help(option), **shape)
        parser.addini(option.ini, option.help, type=_ini_type(option), default=None)


def _ini_type(option: Option) -> Any:
    """Give the type of an ini key: pytest 9's `[tool.pytest]` takes no other value."""
    if option.kind in ("lines", "names"):
        return "linelist"
    native = _NATIVE.get(option.kind)
    if native is None or pytest.version_tuple < (9, 0):
        return "string"
    # A string first: so what an ini file says is judged here, whose messages name the option.
    return str | native if pytest.version_tuple >= (9, 2) else native.__name__


def _help(option: Option) -> str:
    choices = f": {', '.join(option.choices)}" if option.choices else ""
    default = f" (default: {option.default})" if option.default else ""
    return f"{option.help}{choices}{default}".replace("%", "%%")


def configure(config: pytest.Config) -> None:
    """Install what `install` does where no conftest has been loaded, and refuse odd pytests."""
    config.addinivalue_line(
        "markers",
        "pgmonkey(isolation='auto', types='native', max_queries=None, sequences='count'): give the "
        "test a PostgreSQL database that is rolled back, without naming a fixture, or with other "
        "settings than the run's, and at most so many queries.",
    )
    if INTERCEPTION not in config.stash:
        install(config, config.option)
    _check_workers(config)
    # A project that only has the package installed runs on any pytest.
    problem = internals.unsupported(junit=bool(getattr(config.option, "xmlpath", None)))
    if problem and mentions_kit(config):
        raise pytest.UsageError(problem)


def is_distributed(config: pytest.Config) -> bool:
    """Whether the tests run in workers of pytest-xdist; called in its controller."""
    return bool(getattr(config.option, "dist", "no") != "no")


def _check_workers(config: pytest.Config) -> None:
    """Refuse what only one process can do."""
    options = config.stash[OPTIONS]
    if options.sequences == "restart" and options.database == "existing" and is_distributed(config):
        raise pytest.UsageError(
            f"{options.given['sequences']} is restart, and {options.given['database']} existing: "
            "under pytest-xdist each test would wait for another worker's. Use scratch databases, "
            "or run without workers"
        )


def install(config: pytest.Config, arguments: Any) -> None:
    """Decide the options, and stand between the application's handles and their servers."""
    try:
        options = resolve(
            lambda option: getattr(arguments, f"{option.ini}_option", None),
            lambda option: _in_ini(config, option),
            os.environ,
            rootdir=config.rootpath,
            called_from=config.invocation_params.dir,
        )
    except OptionError as error:
        raise pytest.UsageError(str(error)) from None
    interception = Interception(
        options.map, partial(mentions_kit, config), everything=options.intercept != "false"
    )
    config.stash[OPTIONS] = options
    config.stash[INTERCEPTION] = sources.interceptor = interception
    # Where loading a conftest fails, pytest_unconfigure is not called.
    config.add_cleanup(partial(_uninstall, interception))


def _in_ini(config: pytest.Config, option: Option) -> Any:
    try:
        return config.getini(option.ini)
    except (TypeError, ValueError) as error:  # before pytest 9.2
        raise OptionError(f"{option.ini}: {error}") from None


def _uninstall(interception: Interception) -> None:
    if sources.interceptor is interception:
        sources.interceptor = None


def mentions_kit(config: pytest.Config) -> bool:
    """Whether the tests being collected will use the kit, judged by their text.

    Asked only when application code enters a handle while it is imported, and for the header.
    """
    if config.stash[OPTIONS].given or config.stash[OPTIONS].intercept == "true":
        return True
    arguments: Iterable[str] = (
        getattr(config, "args", None) or config.known_args_namespace.file_or_dir
    )
    for argument in arguments or [str(config.rootpath)]:
        path = Path(argument.split("::", 1)[0])
        files = path.rglob("*.py") if path.is_dir() else [path, *path.parent.glob("conftest.py")]
        if any(_mentions(file) for file in files):
            return True
    return False


def _mentions(file: Path) -> bool:
    if not (file.name.startswith("test_") or file.name.endswith(("_test.py", "conftest.py"))):
        return False
    try:
        return re.search(r"\bpgmonkey(_\w+)?\b(?!\.yaml)", file.read_text("utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        return False
