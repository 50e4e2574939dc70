"""The workers of a pytest-xdist run, which share a server; imports no server."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["RUN", "Worker", "new_run", "worker_of"]

RUN: Final = "pgmonkey_run"


@dataclass(frozen=True)
class Worker:
    """One worker of a run."""

    name: str
    run: str
    controller: int


def new_run() -> dict[str, str | int]:
    """Give what the controller of a run tells its workers under the key RUN."""
    return {"name": secrets.token_hex(8), "controller": os.getpid()}


def worker_of(workerinput: dict[str, Any] | None) -> Worker | None:
    """Give the worker that this process is, `None` where it has a server of its own."""
    told = (workerinput or {}).get(RUN)
    if workerinput is None or told is None or os.name == "nt":
        return None
    if os.getppid() != told["controller"]:
        return None  # A worker that is no child of the controller may be on another machine.
    return Worker(workerinput["workerid"], told["name"], told["controller"])
