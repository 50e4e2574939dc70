"""How every test of the project runs; the `fix_*` modules hold the fixtures that tests share."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_pgmonkey import kept_databases

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = [
    "pytester",
    "fix_servers",
    "fix_production",
    "fix_commands",
    "fix_projects",
    "fix_pages",
    "fix_sandbox",
]

# What this process imports stays compiled, or each run of pytest inside a test would compile the
# plugin anew. Those runs write nothing: their tests' files change within the second that counts.
sys.dont_write_bytecode = False
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts its background jobs, and all their children could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this test run's own, also for the runs of pytest inside it."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path
        for left in kept_databases.entries():  # by a test that failed before it has removed it
            left.forget()


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """pytest's own, whose runs keep the order of their tests: pytest-randomly is for those who ask.

    It removes the variable when it is made, so that it can be set only here.
    """
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:randomly")
    return pytester
