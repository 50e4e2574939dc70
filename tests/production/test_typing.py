"""What type checkers see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

USAGE = Path(__file__).with_name("usage.py")


def test_mypy_agrees(tmp_path: Path) -> None:
    """mypy, strict, finds the types that users are to see, and the errors marked as such."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores"]
    command += ["--cache-dir", str(tmp_path), str(USAGE)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=USAGE.parents[2]
    )
    assert found.returncode == 0, found.stdout + found.stderr
