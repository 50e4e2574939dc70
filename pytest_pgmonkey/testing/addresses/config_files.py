"""YAML files that lead other processes to a database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from ..servers.embedded.directories import GuardedProcess, choose_directories

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["ConfigFiles"]


class ConfigFiles:
    """Configuration files of a run, which end with it.

    They may hold a password: a guardian removes them even after a SIGKILL.
    """

    def __init__(self) -> None:
        self._guarded: GuardedProcess | None = None
        self._written: dict[str, Path] = {}

    def write(self, config: Mapping[str, Any]) -> Path:
        """Give a file with this configuration, which only this user can read."""
        text = yaml.safe_dump(dict(config))
        if text not in self._written:
            if self._guarded is None:
                self._guarded = GuardedProcess(choose_directories(None)[:1], None)
            number = f"_{len(self._written)}" if self._written else ""
            path = self._guarded.home / f"pgmonkey_config{number}.yaml"
            with path.open("x", encoding="utf-8") as file:
                path.chmod(0o600)
                file.write(text)
            self._written[text] = path
        return self._written[text]

    def remove(self) -> None:
        """Remove all of them."""
        if self._guarded is not None:
            self._guarded.end()
            self._guarded = None
            self._written.clear()
