"""What a test needs and the machine has not."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def miss(what: str) -> NoReturn:
    """Skip where something is not installed; CI has everything, so it fails there."""
    message = f"needs {what}: install it to run this test"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
