"""Data directories saved between runs, so that a run starts without initdb and migrations.

Each is one file, which got its name when it was complete: whoever has opened it reads all of it,
also while it is being removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from typing import TYPE_CHECKING, Final

from ....caches import locked, partial_directory, private_cache

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["discard", "file_of", "is_saved", "pack", "save"]

FORMAT: Final = 3
LIMIT: Final = 6
_DIRECTORY: Final = "clusters"
_LOCK_LIMIT: Final = 5.0


def file_of(facts: Iterable[object]) -> Path | None:
    """Give where a data directory is saved that comes of these facts, `None` without a cache."""
    cache = private_cache(_DIRECTORY)
    digest = hashlib.sha256(json.dumps([FORMAT, *facts]).encode()).hexdigest()
    return cache / f"cluster-{digest[:24]}" if cache else None


def is_saved(file: Path) -> bool:
    """Tell whether a data directory was saved; it is used now, and stays longer than others."""
    try:
        os.utime(file)
    except OSError:
        return False
    return True


def save(file: Path, data: Path) -> threading.Thread | None:
    """Save a data directory: it is read now, and written while its server runs already.

    Gives the thread that writes it, `None` where it cannot be read.
    """
    try:
        content = pack(str(data))
    except OSError:
        return None
    writing = threading.Thread(target=_store, args=(file, content), name="pgmonkey-save")
    writing.start()
    return writing


def pack(source: str) -> list[bytes]:
    """Give a directory of plain files as one file: an index in its first line, then the contents.

    A disk takes one large file many times faster than a thousand small ones.
    """
    found = list(_walk(source, ""))
    index = [(name, None if content is None else len(content)) for name, content in found]
    return [json.dumps(index).encode() + b"\n", *(content for _, content in found if content)]


def _walk(source: str, prefix: str) -> Iterator[tuple[str, bytes | None]]:
    """Give directories and what is in their files, in the order in which they can be made."""
    with os.scandir(source) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield name, None
                yield from _walk(entry.path, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                with open(entry.path, "rb", buffering=0) as file:  # noqa: PTH123 - a thousand files
                    yield name, file.read()
            else:
                raise OSError(f"{entry.path} is neither a file nor a directory")


def discard(file: Path) -> None:
    """Remove a data directory that turned out not to be whole, or not to work."""
    with contextlib.suppress(OSError):
        file.unlink()


def _store(file: Path, content: list[bytes]) -> None:
    """Write a file, all or nothing; where that fails, there is none."""
    cache = file.parent
    with contextlib.suppress(OSError), locked(cache, _LOCK_LIMIT) as held:
        if held and not file.exists():
            with partial_directory(cache) as directory:
                partial = directory / file.name
                partial.touch(mode=0o600)
                with partial.open("wb") as writing:
                    writing.writelines(content)
                partial.rename(file)
            saved = sorted(cache.glob("cluster-*"), key=lambda one: one.stat().st_mtime)
            for one in saved[:-LIMIT]:
                discard(one)
