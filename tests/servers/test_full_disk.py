"""A disk without room: a failure that says so, and nothing left behind."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.remains import NEEDS_PROC, NEEDS_ROOT, orphaned_segments, processes_of
from helpers.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [NEEDS_PROC, NEEDS_ROOT]

SMALL = """
    from pathlib import Path
    from pytest_pgmonkey.testing.servers.embedded import directories

    directories._bases = lambda: [Path({disk!r})]
    directories.ROOM = 0
"""
FULL = "No space left on device"


@contextmanager
def disk_of(megabytes: int) -> Iterator[Path]:
    """A file system of that size, which every user can enter; a run on it leaves nothing."""
    segments = orphaned_segments()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        disk = Path(name, "disk")
        disk.mkdir()
        options = f"size={megabytes}m,mode=755"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
        try:
            yield disk
            assert wait_until(lambda: not processes_of(disk))
            assert wait_until(lambda: orphaned_segments() <= segments)
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def assert_clean(output: str, disk: Path) -> None:
    """No stack of ours in the output, and nothing on the disk that was not there before."""
    for unwanted in ("INTERNALERROR", "Traceback", "pytest_pgmonkey/testing/", "ResourceWarning"):
        assert unwanted not in output
    assert not list(disk.iterdir())


def test_no_room_for_a_server(project: pytest.Pytester, run: Callable[..., Any]) -> None:
    """A server that finds no room is an error with the reason, once for each test."""
    project.makepyfile("def test_it(pgmonkey): pass\ndef test_plain(): pass")
    with disk_of(8) as disk:
        project.makeconftest(SMALL.format(disk=str(disk)))
        result = run()
        result.assert_outcomes(passed=1, errors=1)
        assert FULL in result.stdout.str()
        assert_clean(result.stdout.str(), disk)


@pytest.mark.parametrize("isolation", ["rollback", "clone"])
def test_the_room_ends_in_a_test(
    project: pytest.Pytester, run: Callable[..., Any], isolation: str
) -> None:
    """The test that needs too much fails with PostgreSQL's words, and the run comes to its end."""
    project.makepyfile(
        """
        def test_before(pgmonkey):
            pgmonkey.execute("INSERT INTO item (name) VALUES ('x')")

        def test_fills(pgmonkey):
            pgmonkey.execute(
                "INSERT INTO item (name) SELECT repeat('x', 1900) FROM generate_series(1, 200000)"
            )

        def test_plain():
            pass
        """
    )
    with disk_of(160) as disk:
        project.makeconftest(SMALL.format(disk=str(disk)))
        result = run(f"--pgmonkey-isolation={isolation}")
        outcomes = result.parseoutcomes()
        assert (outcomes["passed"], outcomes["failed"]) == (2, 1)
        assert FULL in result.stdout.str()
        assert_clean(result.stdout.str(), disk)


def test_no_room_in_the_cache(
    project: pytest.Pytester, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be kept for later runs, this one does not suffer from it."""
    project.makepyfile("def test_it(pgmonkey): pgmonkey.execute('SELECT FROM item')")
    with disk_of(1) as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        run().assert_outcomes(passed=1)
        assert not list(disk.glob("*/clusters/*-*"))
