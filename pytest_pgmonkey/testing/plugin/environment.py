"""The option `env`: an application finds the tests' database in its environment variables.

They are set before the first conftest.py is imported, and put back at the end of the run.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from .configure import OPTIONS, configure, install
from .lifecycle import ENTRANCE, kit_of

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # A conftest may import the application, which may ask for its handles at once.
    install(early_config, early_config.known_args_namespace)
    _lead(early_config, early_config.known_args_namespace)


def pytest_configure(config: pytest.Config) -> None:
    configure(config)
    if ENTRANCE not in config.stash:  # no conftest was loaded
        _lead(config, config.option)


def _lead(config: pytest.Config, arguments: Any) -> None:
    """Set the variables, and listen for who follows them."""
    config.stash[ENTRANCE] = None
    options = config.stash[OPTIONS]
    worker = _worker_name()
    if not options.env or (_is_distributed(arguments) and not worker):
        return
    from psycopg.conninfo import make_conninfo

    from ..addresses.purpose import Purpose
    from ..addresses.variables import values
    from ..gateway.entrance.entrance import Entrance
    from ..servers.launch import expected

    user, dbname = expected(options, worker)
    entrance = Entrance(user, dbname, lambda: kit_of(config).gateway)
    config.add_cleanup(entrance.close)
    config.stash[ENTRANCE] = entrance
    found = values(
        options.env,
        lambda: make_conninfo(**entrance.conninfo(Purpose.SESSION)),
        lambda: entrance.conninfo_by_tcp(Purpose.SESSION),
    )
    config.add_cleanup(partial(_put_back, {name: os.environ.get(name) for name in found}))
    os.environ.update(found)


def _put_back(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _is_distributed(arguments: Any) -> bool:
    """Whether other processes run the tests: in the controller of pytest-xdist nobody listens."""
    given = [getattr(arguments, name, None) for name in ("numprocesses", "tx")]
    return any(given) or getattr(arguments, "dist", "no") != "no"


def _worker_name() -> str:
    """Give the name of the worker that this process is, from before pytest-xdist tells it."""
    # A pytest that a test starts has the variable, too.
    is_started_by_execnet = not hasattr(sys.modules.get("__main__"), "__file__")
    return os.environ.get("PYTEST_XDIST_WORKER", "") if is_started_by_execnet else ""
