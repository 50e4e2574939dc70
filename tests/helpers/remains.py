"""What a server may leave behind, for tests that look for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self/cwd").exists(), reason="looks for remains in /proc, which Linux has"
)
NEEDS_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="is about tests that run as root"
)


def processes_of(directory: Path) -> set[int]:
    """The processes, zombies left out, that are in a server's directory or name it."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                inside = (entry / "cwd").readlink().is_relative_to(directory)
                named = os.fsencode(directory) in (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if inside or named:
                found.add(int(entry.name))
    return found


def segments_of(creators: set[int]) -> list[str]:
    """The System V shared memory segments that these processes have made."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()
    column = lines[0].split().index("cpid")
    return [line for line in lines[1:] if int(line.split()[column]) in creators]


def orphaned_segments() -> set[str]:
    """The shared memory of servers that nobody uses any more, System V's and POSIX's."""
    lines = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    unused = {
        row["shmid"]
        for row in rows
        if row["nattch"] == "0" and not Path("/proc", row["cpid"]).exists()
    }
    posix = {str(path) for path in Path("/dev/shm").glob("PostgreSQL.*")}
    return unused | (posix - _mapped() if posix else posix)


def _mapped() -> set[str]:
    """The files in shared memory that a process has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            lines = maps.read_text("utf-8", errors="replace").splitlines()
            found.update(line.split()[-1] for line in lines if "/dev/shm/" in line)
    return found


def is_gone(directory: Path, processes: set[int]) -> bool:
    """Nothing is left of a server: no directory, no process, no shared memory."""
    return not (directory.exists() or processes_of(directory) or segments_of(processes))


def command_line(pid: int) -> bytes:
    """The arguments of a process; one that has ended has none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
