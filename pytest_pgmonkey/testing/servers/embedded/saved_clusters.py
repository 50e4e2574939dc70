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

__all__ = ["can_save", "discard", "find", "key_of", "pack", "save"]

FORMAT: Final = 2
LIMIT: Final = 6
_DIRECTORY: Final = "clusters"
_LOCK_LIMIT: Final = 5.0


def key_of(facts: Iterable[object]) -> str:
    """Give the name under which a data directory is saved that comes of these facts."""
    text = json.dumps([FORMAT, *facts])
    return f"cluster-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def can_save() -> bool:
    """Tell whether there is a place to save anything."""
    return private_cache(_DIRECTORY) is not None


def find(key: str) -> Path | None:
    """Give the file of the data directory that is saved under a name."""
    cache = private_cache(_DIRECTORY)
    if cache is None:
        return None
    try:
        os.utime(cache / key)  # the last use decides which ones are removed
    except OSError:
        return None
    return cache / key


def save(key: str, data: Path) -> threading.Thread | None:
    """Save a data directory: it is read now, and written while its server runs already.

    Gives the thread that writes it, `None` where it cannot be read.
    """
    cache = private_cache(_DIRECTORY)
    try:
        content = pack(str(data)) if cache else []
    except OSError:
        content = []
    if cache is None or not content:
        return None
    writing = threading.Thread(target=_store, args=(cache, key, content), name="pgmonkey-save")
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


def _store(cache: Path, key: str, content: list[bytes]) -> None:
    """Write a file, all or nothing; where that fails, there is none."""
    with contextlib.suppress(OSError), locked(cache, _LOCK_LIMIT) as held:
        if held and not (cache / key).exists():
            with partial_directory(cache) as partial:
                file = partial / key
                file.touch(mode=0o600)
                with file.open("wb") as writing:
                    writing.writelines(content)
                file.rename(cache / key)
            saved = sorted(cache.glob("cluster-*"), key=lambda file: file.stat().st_mtime)
            for file in saved[:-LIMIT]:
                discard(file)
