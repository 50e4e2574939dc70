"""Waiting for what other processes and threads do, which no event announces."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60.0  # far more than anything takes, also on a machine that is busy


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> bool:
    """Wait for something that no event announces; tell whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for what another process or thread brings about."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.005)
    return result
