"""Remembers tests that rollback cannot serve, and writes the summary's lines on them.

A report of such a test carries why: so the process that has pytest's cache learns of it, whichever
process ran the test.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["WORKER_INPUT", "Memory", "known_to", "of_this_run"]

WORKER_INPUT: Final = "pgmonkey_clones"
_CACHE_KEY: Final = "pgmonkey/clones"
_ATTRIBUTE: Final = "pgmonkey_moved"
_MEMORY: Final = pytest.StashKey["Memory"]()
# Then the test is tried in rollback again: what it needed a clone for may be gone.
_LASTING: Final = timedelta(days=30)


def of_this_run(config: pytest.Config) -> Memory:
    """Give the memory of this process; its first use activates it."""
    memory = config.stash.get(_MEMORY, None)
    if memory is None:
        memory = config.stash[_MEMORY] = Memory(config)
        config.pluginmanager.register(memory, "pgmonkey-memory")
    return memory


def known_to(config: pytest.Config) -> dict[str, list[str]]:
    """Give what earlier runs have learnt."""
    if hasattr(config, "workerinput"):
        known: dict[str, list[str]] = config.workerinput.get(WORKER_INPUT, {})
        return known
    return _read(getattr(config, "cache", None))


class Memory:
    """Knows tests by node id, and why rollback cannot serve them."""

    def __init__(self, config: pytest.Config) -> None:
        self._cache = getattr(config, "cache", None)
        self._is_worker = hasattr(config, "workerinput")
        self.known = known_to(config)
        self._is_changed = False
        self._moved: dict[str, str] = {}

    def recall(self, item: pytest.Item) -> str:
        """Give why a test needs a clone; empty if nothing is known of it."""
        return self.known.get(_key(item), [""])[0] if self.known else ""

    @staticmethod
    def attach(
        report: pytest.TestReport, item: pytest.Item, reason: str, *, has_moved: bool
    ) -> None:
        """Say in a report why its test needs a clone, and whether it ran in one."""
        setattr(report, _ATTRIBUTE, [_key(item), reason, has_moved])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = getattr(report, _ATTRIBUTE, None)
        if found is None:
            return
        key, reason, has_moved = found
        if has_moved:
            self._moved[key] = reason
        if key not in self.known:
            self.known[key] = [reason, date.today().isoformat()]
            self._is_changed = True

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        if self._is_changed and self._cache is not None and not self._is_worker:
            # Another run may have come to know of others meanwhile.
            self._cache.set(_CACHE_KEY, {**_read(self._cache), **self.known})

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        number = len(self._moved)
        if not number:
            return
        if number == 1:
            line = "1 test ran in a clone, rollback cannot serve it"
        else:
            line = f"{number} tests ran in clones, rollback cannot serve them"
        terminalreporter.write_line(f"pgmonkey: {line}")
        if terminalreporter.config.get_verbosity() > 0:
            for key, reason in sorted(self._moved.items()):
                terminalreporter.write_line(f"  {key}: {reason}")
            terminalreporter.write_line(
                '  To say so in the code: @pytest.mark.pgmonkey(isolation="clone")'
            )


def _key(item: pytest.Item) -> str:
    """Give a test's node id, without the group that pytest-xdist adds to it."""
    name, _, group = item.nodeid.rpartition("@")
    is_group = any(
        group in (*mark.args, mark.kwargs.get("name")) for mark in item.iter_markers("xdist_group")
    )
    return name if name and is_group else item.nodeid


def _read(cache: Any) -> dict[str, list[str]]:
    """Read what earlier runs have learnt, unless it is too old."""
    found = cache.get(_CACHE_KEY, {}) if cache is not None else {}
    oldest = (date.today() - _LASTING).isoformat()
    return {key: fact for key, fact in _well_formed(found).items() if fact[1] > oldest}


def _well_formed(found: Any) -> Mapping[str, list[str]]:
    """Give the valid entries: users can change the file."""
    if not isinstance(found, dict):
        return {}
    return {
        key: fact
        for key, fact in found.items()
        if isinstance(fact, list) and len(fact) == 2 and all(isinstance(x, str) for x in fact)
    }
