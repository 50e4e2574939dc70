"""Names for processes that no other process will ever have."""

from __future__ import annotations

from pathlib import Path


def process_name(pid: int) -> str:
    """Name a process as no other will ever be named; empty where it has ended or none can be."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        # One that waits for its parent to notice its end has ended.
        return "" if facts[0] == "Z" else f"{_machine()} {pid} {facts[19]}"
    except OSError:
        return ""


def is_dead(owner: str) -> bool:
    """Whether the process of a name is known to have ended: one of elsewhere is not."""
    machine, _, process = owner.rpartition(" ")[0].rpartition(" ")
    try:
        return machine == _machine() and process_name(int(process)) != owner
    except (OSError, ValueError):
        return False


def _machine() -> str:
    """Name this boot of this machine and what process numbers mean here."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
