"""The option `env`: an application finds the tests' database in its environment variables.

They are set before the first conftest.py is imported, and put back at the end of the run.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from ...errors import PGMonkeyError
from .configure import OPTIONS, configure, install
from .lifecycle import ENTRANCE, kit_of, name_run, worker_name

if TYPE_CHECKING:
    from collections.abc import Mapping

_NOBODY: Final = {"host": "127.0.0.1", "port": "1", "password": ""}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # A conftest may import the application, which may ask for its handles at once.
    install(early_config, early_config.known_args_namespace)
    _lead(early_config, early_config.known_args_namespace)


def pytest_configure(config: pytest.Config) -> None:
    configure(config)
    if ENTRANCE not in config.stash:  # no conftest was loaded
        _lead(config, config.option)
    if (file := config.stash[OPTIONS].report) is not None:
        from .report import write_report

        write_report(config, file)


def _lead(config: pytest.Config, arguments: Any) -> None:
    """Set the variables, and listen for clients that use them."""
    config.stash[ENTRANCE] = None
    if not config.stash[OPTIONS].env:
        return
    try:
        found = _variables(config, is_controller=_is_distributed(arguments) and not worker_name())
    except PGMonkeyError as error:
        raise pytest.UsageError(f"pgmonkey: {error}") from None
    config.add_cleanup(partial(_put_back, {name: os.environ.get(name) for name in found}))
    os.environ.update(found)


def _variables(config: pytest.Config, *, is_controller: bool) -> dict[str, str]:
    from psycopg.conninfo import make_conninfo

    from ..addresses.purpose import Purpose
    from ..addresses.variables import values
    from ..servers.launch import expected

    options = config.stash[OPTIONS]
    user, dbname = expected(options, worker_name())
    if is_controller:
        # An application that its conftest imports must not find the developer's own database.
        nobody = {**_NOBODY, "user": user, "dbname": dbname}
        found = values(options.env, lambda: make_conninfo(**nobody), lambda: nobody)
        return {**found, **name_run(config)}
    from ..gateway.entrance.entrance import Entrance

    entrance = config.stash[ENTRANCE] = Entrance(user, dbname, lambda: kit_of(config).gateway)
    config.add_cleanup(entrance.close)
    return values(
        options.env,
        lambda: make_conninfo(**entrance.conninfo(Purpose.SESSION)),
        lambda: entrance.conninfo_by_tcp(Purpose.SESSION),
    )


def _put_back(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _is_distributed(arguments: Any) -> bool:
    """Whether other processes run the tests, as pytest-xdist decides it later."""
    if arguments.collectonly:
        return False
    number = getattr(arguments, "numprocesses", None)
    if number is None:
        return getattr(arguments, "dist", "no") != "no" and bool(getattr(arguments, "tx", None))
    return bool(number) and not (arguments.usepdb and number in ("auto", "logical"))
